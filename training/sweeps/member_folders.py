"""The folder of each member of a study: named by the point of the sweep, or the one that holds the same run already."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chz.blueprint import Castable

from recollect.configuration import UserError, apply_values, to_json
from recollect.configuration.io import flatten
from recollect.configuration.read_json import read_json_object
from recollect.configuration.short_paths import short_paths
from recollect.training.experiment import Experiment


def members(experiments: list[Experiment], sweep: tuple[dict[str, Any], ...], folder: Path) -> list[list[Experiment]]:
    """Returns the members of each experiment, with their folders below `folder`/EXPERIMENT, or `folder`/TASK/EXPERIMENT
    where it names its task. Where a folder there holds a member's config already, under the name of a point of other
    axes, it is the member's."""
    return [_members(experiment, sweep, folder / experiment.task / experiment.name) for experiment in experiments]


def _members(experiment: Experiment, sweep: tuple[dict[str, Any], ...], folder: Path) -> list[Experiment]:
    names = flatten(to_json(experiment))
    before: dict[str, Path] = {}
    for path in sorted(folder.glob("*/config.json")):
        try:
            before.setdefault(_same(read_json_object(path)), path.parent)
        except UserError:
            continue  # a damaged one is reported where its run is opened
    row = []
    for point in sweep:
        directory = folder / member_name(point, names)
        member = apply_values(experiment, {**point, "run.directory": str(directory)})
        if not directory.exists() and (same := before.get(_same(to_json(member)))):
            member = apply_values(member, {"run.directory": str(same)})
        row.append(member)
    return row


def _same(config: dict[str, Any]) -> str:
    """Returns a config.json without its folder as text: equal for runs that are one."""
    return json.dumps({**config, "run": {**config.get("run", {}), "directory": None}}, sort_keys=True)


def member_name(point: dict[str, Any], paths: Iterable[str] = ()) -> str:
    """Returns a folder name for a point, `learning_rate=0.003,seed=1`: each field by the end of its path that means no
    other one of `paths`, those of the experiment."""
    values = {path: value.value if isinstance(value, Castable) else value for path, value in point.items()}
    names = short_paths(values, [path for path in paths if path not in values])
    parts = [f"{names[path].lstrip('.')}={value}" for path, value in values.items()]
    return re.sub(r"[^\w.=,+-]", "_", ",".join(parts)) or "only"
