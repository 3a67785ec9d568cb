"""What must compile ahead of time: one module an operation, each with PROGRAMS. `python -m
tests.pallas_kernels.programs` compiles them."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from recollect.pallas_kernels.compile_ahead import TOPOLOGIES, Report

CHIPS_OF = {"pallas_gpu": ("h100",), "pallas_tpu": tuple(TOPOLOGIES)}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function that holds kernels, at one shape.

    name: what it is and its sizes, for messages ("linear_recurrence gated gradient b2 t2048 h16 k64 v64"), unique with
    its backend.
    backend: "pallas_gpu" or "pallas_tpu"; the function names it too, so that nothing else serves.
    function: called as function(*arguments); forward and gradient are programs apart.
    arguments: trees of jax.ShapeDtypeStruct.
    quick: one of the few that every change compiles.
    special: of a GPU kernel, how many instructions for special functions it may hold; None does not say.
    """

    name: str
    backend: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    quick: bool = False
    special: int | None = None

    @property
    def chips(self) -> tuple[str, ...]:
        """The chips it must compile for."""
        return CHIPS_OF[self.backend]

    def complaints(self, report: Report) -> list[str]:
        """What is wrong with the program, compiled."""
        over = [kernel for kernel in report.kernels if self.special is not None and kernel.special > self.special]
        said = [
            f"{kernel.name} holds {kernel.special} instructions for special functions, more than {self.special}"
            for kernel in over
        ]
        return report.complaints() + said


def all_programs(*, quick: bool = False, only: str = "") -> list[Program]:
    """The programs of all modules here, in order of module: all or the quick ones, those whose name holds `only`."""
    found: list[Program] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        if not module.name.startswith("_"):
            found += importlib.import_module(f"{__name__}.{module.name}").PROGRAMS
    keys = [(program.name, program.backend) for program in found]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"two programs of one name: {sorted(twice)}")
    return [program for program in found if (program.quick or not quick) and only in program.name]
