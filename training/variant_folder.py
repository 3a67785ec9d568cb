"""Folders of further variants of an experiment: named by the fields that differ from the run in runs/NAME."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import chz
from chz.util import MISSING

from recollect.configuration import Config, UserError, from_json, get_field
from recollect.configuration.base import encoded
from recollect.configuration.field_types import default_of
from recollect.configuration.io import flatten
from recollect.configuration.read_json import read_json
from recollect.configuration.short_paths import short_paths
from recollect.evaluation.labels import config_fields, written
from recollect.training.experiment import Experiment
from recollect.training.resumed_config import CHANGEABLE, check_resumable
from recollect.training.run_state import run_directory

LONGEST = 120
"""Characters of a folder's name; file systems take 255 bytes."""


def with_folder(experiment: Experiment) -> tuple[Experiment, Any]:
    """Returns an experiment without `run.directory` with a folder of its own where runs/NAME holds a run that it cannot
    continue, because they differ: runs/NAME,field=value; and a log that prints so before its first line, and nothing
    for a run that is refused."""
    folder = run_directory(experiment)
    try:
        check_resumable(folder, experiment)
        return experiment, print
    except UserError:
        try:
            before = from_json(read_json(folder / "config.json"))
        except UserError:
            return experiment, print  # what is wrong with that folder is said where the run opens it
    variant = folder.with_name(variant_name(before, experiment))
    left = [f"{folder} holds another variant of {experiment.name}; this one is in {variant}"]

    def log(text: str) -> None:
        while left:
            print(left.pop())
        print(text)

    return chz.replace(experiment, run=chz.replace(experiment.run, directory=str(variant))), log


def variant_name(before: Config, experiment: Experiment) -> str:
    """Returns NAME,field=value,... of the fields that differ, by the shortest ends of their paths that mean no other
    field, without the defaults of a class that was put in; too long a name ends in a digest of all fields."""
    changed, paths = _changed(before, experiment)
    names = short_paths(changed, paths)
    parts = [f"{names[path]}={value}" for path, value in changed.items()]
    whole = re.sub(r"[^\w.=,+-]+", "_", ",".join([experiment.name, *parts]))
    if len(whole) <= LONGEST:
        return whole
    return f"{whole[: LONGEST - 9]}-{hashlib.sha256(str(changed).encode()).hexdigest()[:8]}"


def _changed(before: Config, experiment: Experiment) -> tuple[dict[str, str], set[str]]:
    """Returns the fields that differ, with their values now, and all paths of both configs."""
    was, now = (config_fields(encoded(config), "") for config in (before, experiment))
    changed = {path: written(value) for path, value in now.items() if was.get(path) != value}
    empty = flatten(encoded(experiment))  # those of None too
    gone = was.keys() - now.keys()
    parents = {path: path.rpartition(".")[0] for path in gone}
    changed |= {path: "None" for path in sorted(gone) if parents[path] not in changed and parents[path] not in gone}
    for part in [path for path in changed if path in now and isinstance(get_field(experiment, path), Config)]:
        value = get_field(experiment, part)
        for name, field in chz.chz_fields(value).items():
            default = default_of(field)
            if default is not MISSING and json.dumps(encoded(getattr(value, name))) == json.dumps(encoded(default)):
                inside = f"{part}.{name}."
                changed = {path: text for path, text in changed.items() if not f"{path}.".startswith(inside)}
    return {path: value for path, value in changed.items() if path not in CHANGEABLE}, {*was, *now, *empty}
