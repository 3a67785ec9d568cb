"""Training of a study: every experiment at every point, finished members skipped, one folder per member."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from recollect.configuration import Preempted, apply_values, to_json
from recollect.training.experiment import Experiment, program_of
from recollect.training.run_state import run_directory
from recollect.training.sweeps.population import train_members


def members(experiments: list[Experiment], sweep: tuple[dict[str, Any], ...], folder: Path) -> list[list[Experiment]]:
    """Returns the members of each experiment, with their folders below `folder`/EXPERIMENT."""

    def member(experiment: Experiment, point: dict[str, Any]) -> Experiment:
        return apply_values(experiment, {**point, "run.directory": str(folder / experiment.name / member_name(point))})

    return [[member(experiment, point) for point in sweep] for experiment in experiments]


def member_name(point: dict[str, Any]) -> str:
    """Returns a folder name for a point: `learning_rate=0.003,seed=1`."""
    parts = [f"{path.rpartition('.')[2]}={value}" for path, value in point.items()]
    return re.sub(r"[^\w.=,+-]", "_", ",".join(parts)) or "only"


def run_study(
    experiments: list[Experiment],
    sweep: tuple[dict[str, Any], ...],
    folder: Path,
    *,
    together: bool | None = None,
    log: Callable[[str], None] = print,
) -> list[Path]:
    """Trains what is not finished; returns all members' folders.

    Args:
      together: train members that differ in values only at once, in one compiled program; None: on accelerators (on a
        CPU, members in turn are faster).

    Raises:
      Preempted: SIGTERM came, and the members in training were saved.
    """
    if together is None:
        together = jax.default_backend() != "cpu"
    folders = []
    rows = members(experiments, sweep, folder)
    for number, row in enumerate(rows, 1):
        log(f"[{number}/{len(rows)}] {row[0].name}: {len(row)} runs")
        for group in groups(row) if together else [[member] for member in row]:
            results = train_members(group, together=together and len(group) > 1, log=log)
            if any(result["status"] == "preempted" for result in results):
                raise Preempted(f"{folder}: preempted")
        folders += [run_directory(member) for member in row]
    return folders


def groups(row: list[Experiment]) -> list[list[Experiment]]:
    """Returns groups of members that compile to one program and draw their data on the device, in order."""
    groups: dict[str, list[Experiment]] = {}
    for member in row:
        key = str(to_json(program_of(member))) if member.data.made_on_device else f"alone {len(groups)}"
        groups.setdefault(key, []).append(member)
    return list(groups.values())
