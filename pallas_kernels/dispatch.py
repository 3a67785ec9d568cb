"""Choice of the backend that an operation runs on, by its arguments, the device and the mesh.

An operation declares its backends once, best first, as the paths of their modules:

    BACKENDS = {"pallas_tpu": "recollect.pallas_kernels.OPERATION.tpu", "xla": "recollect.pallas_kernels.OPERATION.xla"}

A backend's module has a function of the operation's name and, unless it serves every valid call, `refuses`, which takes
the same arguments and returns why it cannot serve them (None: it can). `choose` imports a module only when it asks for
that reason or returns the function, and asks only where the backend's kernels run at all: no kernel is imported on a
CPU. `backend=None` takes the first that serves; naming one that does not raises with its reason.

Kernels are chosen for the device a program is traced for: the default one, or another inside `aimed_at` (compiling
ahead of time). Inside `interpreted` they run on any machine, simulated. Libraries are backends too: two of jax's, cudnn
(NVIDIA's, through jax.nn) and splash (splash attention for TPUs), and jla, the optional package jax-linear-attention
(where kernels are simulated, its plain-JAX functions serve).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
from jax.sharding import AxisType

RUNS_ON = {
    "pallas_gpu": "NVIDIA Hopper GPUs",
    "cudnn": "NVIDIA GPUs",
    "splash": "TPUs",
    "pallas_tpu": "TPUs",
    "jla": "NVIDIA Hopper GPUs",
}
"""What kernels and libraries run on; the other backends run everywhere."""

BACKENDS = (*RUNS_ON, "xla", "reference")
Refusal = str | None
Interpretation = Literal["values", "races"]

SEQUENCE = "sequence"
"""The mesh axis that splits tokens."""


@dataclasses.dataclass(frozen=True)
class Device:
    """platform: "cpu", "gpu" or "tpu"; kind: as jax names it ("NVIDIA H100 80GB HBM3", "TPU v5 lite")."""

    platform: str
    kind: str


class Refused(ValueError):
    """Raised where a named backend does not support a call, with the reason that `supports` returns, before anything
    is traced. Other errors of a kernel are faults."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that an operation runs on, and for each preferred backend passed over, why."""

    operation: str
    backend: str
    passed_over: tuple[tuple[str, str], ...] = ()


# jax keeps traces by function and shapes: what an operation was chosen for has to be part of that key, or a jitted
# function would run elsewhere with what was chosen here.
_circumstances: Any = jax.make_user_context(None)
_preferred: contextvars.ContextVar[str | None] = contextvars.ContextVar("preferred_backend", default=None)
_aim: contextvars.ContextVar[Device | None] = contextvars.ContextVar("aim", default=None)
_interpretation: contextvars.ContextVar[Interpretation | None] = contextvars.ContextVar("interpretation", default=None)
_record: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("record", default=None)


def preferred_backend(backend: str) -> contextlib.AbstractContextManager[None]:
    """Makes operations traced inside that leave `backend` open run on this one where it supports them; tests compare
    whole models so."""
    return _holding(_preferred, backend)


def aimed_at(platform: str, kind: str) -> contextlib.AbstractContextManager[None]:
    """Traces operations inside for this kind of device, whatever the machine has."""
    return _holding(_aim, Device(platform, kind))


def interpreted(how: Interpretation = "values") -> contextlib.AbstractContextManager[None]:
    """Simulates kernels traced inside, on any machine: "values" for what they compute, "races" to look for races too.

    With RECOLLECT_ON_DEVICE set in the environment they run on the device as they are: so the tests of simulated
    kernels test the real ones.
    """
    return contextlib.nullcontext() if os.environ.get("RECOLLECT_ON_DEVICE") else _holding(_interpretation, how)


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Yields the choices that operations traced inside make, in order, repeats included."""
    choices: list[Choice] = []
    with _holding(_record, choices):
        yield choices


def device() -> Device:
    """Returns the device that is being traced for."""
    aim = _aim.get()
    if aim is not None:
        return aim
    platform = jax.default_backend()
    return Device(platform, jax.devices()[0].device_kind)


def interpretation() -> Interpretation | None:
    """Returns how kernels are to be simulated; None if they run for real."""
    return _interpretation.get()


def kernels_run_here(backend: str) -> Refusal:
    """Returns why kernels of this backend cannot run on what is being traced for, or None; None for those without."""
    if backend not in RUNS_ON:
        return None
    if device().platform == "cpu" and interpretation() is None:
        return f"it runs on {RUNS_ON[backend]}; this is cpu"
    from recollect.pallas_kernels.accelerators import kernels_run_on

    return kernels_run_on(backend, device(), simulated=interpretation() is not None, aimed=_aim.get() is not None)


def choose(
    operation: str, backend: str | None, backends: Mapping[str, str], *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """Returns the backend's function to call with `args` and `kwargs`.

    Args:
      operation: its name, which the function has in the backend's module.
      backend: the one to take; None takes the first that serves the call.
      backends: name -> path of the module, best first.

    Raises:
      ValueError: unknown backend.
      Refused: one this operation lacks, or one that refuses this call (with its reason).
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"{operation}: backend={backend!r} is unknown; known are {', '.join(BACKENDS)}")
    if backend not in (None, *backends):
        raise Refused(f"{operation}: has no backend {backend}; it has {', '.join(backends)}")
    first = backend or _preferred.get()
    passed_over: list[tuple[str, str]] = []
    for name in sorted(backends, key=lambda name: name != first):
        reason = supports(name, backends, *args, **kwargs)
        if reason is None:
            if (record := _record.get()) is not None:
                record.append(Choice(operation, name, tuple(passed_over)))
            _log_choice(operation, name)
            return getattr(importlib.import_module(backends[name]), operation)
        if name == backend:
            raise Refused(f"{operation}: {backend} cannot serve this call: {reason}")
        passed_over.append((name, reason))
    raise ValueError(f"{operation}: no backend serves this call")


def supports(backend: str, backends: Mapping[str, str], *args: Any, **kwargs: Any) -> Refusal:
    """Returns why this backend cannot serve a call, or None: where its kernels cannot run at all, that; else what its
    module's `refuses` says."""
    reason = kernels_run_here(backend)
    if reason is not None:
        return reason
    refuses = getattr(importlib.import_module(backends[backend]), "refuses", None)
    return None if refuses is None else refuses(*args, **kwargs)


@functools.cache
def _log_choice(operation: str, backend: str) -> None:
    logging.getLogger(__name__).info("%s runs on %s", operation, backend)


@contextlib.contextmanager
def _holding(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        with _circumstances((_preferred.get(), _aim.get(), _interpretation.get())):
            yield
    finally:
        variable.reset(token)


def free_axes() -> dict[str, int]:
    """Returns the sizes of the axes of the ambient mesh (jax.set_mesh, jax.sharding.use_abstract_mesh) over which the
    compiler, not a surrounding shard_map, splits arrays; no axis without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def is_split() -> bool:
    """Returns whether there is such an axis of more than one device."""
    return any(size > 1 for size in free_axes().values())


def sequence_parts(length: int) -> int:
    """Returns the number of parts that the ambient mesh splits `length` tokens into: 1 without a mesh, inside of a
    shard_map over it, and where its axis sequence does not divide the length."""
    parts = free_axes().get(SEQUENCE, 1)
    return parts if length % parts == 0 else 1
