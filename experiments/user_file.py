"""Experiments and studies in a file of the user's: `my_file.py:NAME`, or `my_file.py` where it defines one."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import chz

from recollect.configuration import UserError
from recollect.configuration.machine import expanded
from recollect.configuration.names import nearest
from recollect.configuration.python_files import USER_FILES, errors_named, load_definitions
from recollect.experiments.study import Study
from recollect.starting import PROGRAM
from recollect.training.experiment import Experiment


def is_file(name: str) -> bool:
    """Returns whether an experiment or study is named by a file: FILE.py or FILE.py:NAME."""
    return name.endswith(".py") or ".py:" in name


def split(reference: str) -> tuple[Path, str]:
    """Returns the file and the name, which may be empty, of FILE.py[:NAME]."""
    before, _, name = reference.rpartition(".py")
    return expanded(before + ".py", reference), name.removeprefix(":")


def label(reference: str) -> str:
    """Returns the name of what FILE.py[:NAME] means, as a folder may be called: FILE.NAME."""
    path, name = split(reference)
    return f"{path.stem}.{name}" if name else path.stem


def load_from_file(reference: str, kind: str) -> Any:
    """Returns the experiment or study (`kind`) that a file defines.

    A study may also be a list, tuple or dict (label -> experiment) of experiments, or one experiment.

    Raises:
      UserError: there is none of this name; without a name, not exactly one; or it cannot be made.
    """
    path, name = split(reference)
    module = load_definitions(path)
    if not name:
        name = _only(module, path, kind)
        reference = f"{path}:{name}"
    elif not hasattr(module, name):
        hint = nearest(name, _defined(module))
        raise UserError(f"{path} defines no {name!r}{hint}; it defines {_listed(module)}")
    value = getattr(module, name)
    if callable(value):
        required = [one.name for one in inspect.signature(value).parameters.values() if one.default is one.empty]
        if required:
            raise UserError(f"{reference} takes arguments ({', '.join(required)}): a function without is needed")
        with errors_named(USER_FILES[path.resolve()]):
            value = value()
    return _as_kind(value, kind, reference)


def _as_kind(value: Any, kind: str, reference: str) -> Any:
    if isinstance(value, dict):
        labelled = [(str(name), one) for name, one in value.items()]
        value = [chz.replace(one, name=name) if isinstance(one, Experiment) else one for name, one in labelled]
    if isinstance(value, Experiment) and kind == "study":
        value = [value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, Experiment) for one in value):
        value = Study(tuple(value))
    if isinstance(value, Study):
        names = [one.name for one in value.experiments]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{reference} has two experiments named {repeated[0]!r}: names are labels and folders")
        if kind == "experiment":
            arguments = shlex.join([reference, *(["--only", names[0]] if names else [])])
            raise UserError(f"{reference} is a study: use `{PROGRAM} compare {arguments}`")
    if not isinstance(value, Study if kind == "study" else Experiment):
        what = "an Experiment, a Study or a list of experiments"
        raise UserError(
            f"{reference} gives a {type(value).__name__}; it must be {what}, or a function that returns one"
        )
    return value


def _kind_of(value: Any, module: ModuleType) -> str | None:
    """Returns "experiment" or "study" of a value of a module, by the annotation where it is a function; None of
    others."""
    if inspect.isfunction(value):
        if value.__module__ != module.__name__:
            return None
        text = str(value.__annotations__.get("return"))  # Experiment, list[Experiment], Study; a class or its name
        is_study = "Study" in text or ("Experiment" in text and "[" in text)
        return "study" if is_study else "experiment" if "Experiment" in text else None
    several = list(value.values()) if isinstance(value, dict) else value
    if isinstance(several, (list, tuple)):
        return "study" if several and all(isinstance(one, Experiment) for one in several) else None
    return {Experiment: "experiment", Study: "study"}.get(type(value))


def _defined(module: ModuleType) -> dict[str, str]:
    """Returns the names of the experiments and studies that a module defines, with their kinds."""
    kinds = {name: _kind_of(value, module) for name, value in vars(module).items() if not name.startswith("_")}
    return {name: kind for name, kind in kinds.items() if kind}


def _listed(module: ModuleType) -> str:
    listed = ", ".join(f"{name} ({kind})" for name, kind in _defined(module).items())
    return listed or "no function annotated `-> Experiment` or `-> Study`"


def _only(module: ModuleType, path: Path, kind: str) -> str:
    """Returns the one name that a file without :NAME means."""
    defined = _defined(module)
    names = [name for name, one in defined.items() if one == kind]
    if kind == "study" and not names:
        names = list(defined)
    if len(names) == 1:
        return names[0]
    if not names and defined:
        raise UserError(
            f"{path} defines {_listed(module)}, no experiment: use `{PROGRAM} compare {shlex.quote(str(path))}`"
        )
    example = f": for example {path}:{names[0]}" if names else ""
    raise UserError(f"{path} defines {_listed(module)}; name one {kind}{example}")
