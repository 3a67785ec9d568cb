"""Folders of further variants of an experiment: named by the fields that differ from the run in runs/NAME."""

from __future__ import annotations

import hashlib
import re

import chz

from recollect.configuration import UserError, differences, from_json
from recollect.configuration.read_json import read_json
from recollect.training.experiment import Experiment
from recollect.training.resumed_config import CHANGEABLE, check_resumable
from recollect.training.run_state import run_directory

LONGEST = 120
"""Characters of a folder's name; file systems take 255 bytes."""


def with_folder(experiment: Experiment) -> Experiment:
    """Returns an experiment without `run.directory` with a folder of its own where runs/NAME holds a run that it cannot
    continue, because they differ: runs/NAME,field=value."""
    folder = run_directory(experiment)
    try:
        check_resumable(folder, experiment)
        return experiment
    except UserError:
        try:
            before = from_json(read_json(folder / "config.json"))
        except UserError:
            return experiment  # what is wrong with that folder is said where the run opens it
    changed = {path: pair for path, pair in differences(before, experiment).items() if path not in CHANGEABLE}
    own = folder.with_name(variant_name(experiment.name, {path: now for path, (_, now) in changed.items()}))
    print(f"{folder} holds another variant of {experiment.name}; this one is in {own}")
    return chz.replace(experiment, run=chz.replace(experiment.run, directory=str(own)))


def variant_name(name: str, fields: dict[str, object]) -> str:
    """Returns NAME,field=value,...; too long a name ends in a digest of all fields."""
    parts = [f"{path.removesuffix('.class').rpartition('.')[2]}={value}" for path, value in fields.items()]
    whole = re.sub(r"[^\w.=,+-]+", "_", ",".join([name, *parts]))
    if len(whole) <= LONGEST:
        return whole
    return f"{whole[: LONGEST - 9]}-{hashlib.sha256(str(fields).encode()).hexdigest()[:8]}"
