"""Finds experiments and studies by name.

Listing reads source files without importing them: it must not wait for jax. A module of this folder offers its public
functions without arguments that return an Experiment or a Study, and the experiments in its VARIANTS, a dict of name ->
docstring, which its function `variant(name)` returns: a literal, or imported by that name from a module without jax.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recollect.configuration.base import UserError
from recollect.configuration.names import nearest
from recollect.starting import PROGRAM

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """Describes one experiment or study: its name is MODULE.FUNCTION or MODULE.VARIANT."""

    name: str
    kind: str
    docstring: str
    variant: bool = False

    @property
    def summary(self) -> str:
        """Returns the docstring's first paragraph as one line."""
        return self.docstring.split("\n\n")[0].replace("\n", " ")


def entries() -> dict[str, Entry]:
    """Returns all experiments and studies by name, in the order of their files."""
    return {entry.name: entry for path in sorted(FOLDER.glob("*.py")) for entry in _entries_of(path)}


def _entries_of(path: Path) -> Iterator[Entry]:
    for node in ast.parse(path.read_text()).body:
        variants: dict[str, str] = {}
        if isinstance(node, ast.ImportFrom) and node.names[0].asname == "VARIANTS":
            variants = getattr(importlib.import_module(str(node.module)), node.names[0].name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS":
            variants = ast.literal_eval(node.value)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not node.args.args:
            kind = node.returns.id if isinstance(node.returns, ast.Name) else None
            if kind in ("Experiment", "Study"):
                yield Entry(f"{path.stem}.{node.name}", kind.lower(), ast.get_docstring(node) or "")
        for name, text in variants.items():
            yield Entry(f"{path.stem}.{name}", "experiment", inspect.cleandoc(text), variant=True)


def load(name: str, kind: str) -> Any:
    """Returns the experiment or study (`kind`) called `name`; raises UserError with the nearest where there is none."""
    path = FOLDER / f"{name.partition('.')[0]}.py"
    entry = next((one for one in _entries_of(path) if one.name == name), None) if path.is_file() else None
    if entry is None:
        hint = nearest(name, [other.name for other in entries().values() if other.kind == kind])
        raise UserError(f"there is no {kind} named {name!r}{hint}; `{PROGRAM} list` shows all")
    if entry.kind != kind:
        what, command = ("a study", "compare") if entry.kind == "study" else ("an experiment", "train")
        raise UserError(f"{name} is {what}: use `{PROGRAM} {command} {name}`")
    module_name, attribute = name.split(".")
    module = importlib.import_module(f"recollect.experiments.{module_name}")
    return module.variant(attribute) if entry.variant else getattr(module, attribute)()
