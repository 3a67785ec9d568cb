"""Finds experiments and studies by name. Listing reads source files without importing them: it must not wait for
jax."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from pathlib import Path
from typing import Any

from recollect.configuration.base import UserError, nearest

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public function of experiments/MODULE.py that returns an Experiment or a Study."""

    name: str
    kind: str
    summary: str
    docstring: str


def entries() -> dict[str, Entry]:
    """All experiments and studies by name, in the order of their files."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.args.args:
                continue
            kind = node.returns.id if isinstance(node.returns, ast.Name) else None
            if kind in ("Experiment", "Study"):
                name = f"{path.stem}.{node.name}"
                text = ast.get_docstring(node) or ""
                found[name] = Entry(name, kind.lower(), text.split("\n\n")[0].replace("\n", " "), text)
    return found


def load(name: str, kind: str) -> Any:
    """Calls the function called `name`.

    Args:
      kind: "experiment" or "study".

    Raises:
      UserError: there is none of that name and kind; the nearest are given.
    """
    known = entries()
    entry = known.get(name)
    if entry is None:
        raise UserError(
            f"there is no {kind} named {name!r}{nearest(name, [e.name for e in known.values() if e.kind == kind])}; `python main.py list` shows all"
        )
    if entry.kind != kind:
        command = "compare" if entry.kind == "study" else "train"
        raise UserError(
            f"{name} is {'a study' if entry.kind == 'study' else 'an experiment'}: use `python main.py {command} {name}`"
        )
    module, function = name.split(".")
    return getattr(importlib.import_module(f"recollect.experiments.{module}"), function)()
