"""How long a study takes, from short runs of a few of its programs in a folder that is deleted again.

Of M mixers on K tasks M + K - 1 programs are timed: one mixer on every task, and every mixer on one task. The other
times follow from log t(mixer, task) = a(mixer) + b(task), fitted by least squares: steps of two mixers take the same
ratio of times on each task, nearly so where tasks are about as long. Each program is run twice for two device calls:
the first run compiles, and what the second took in all, in steps and in its evaluation are three numbers that every run
of it repeats. Short runs are made as the study's are, in as many processes or as a population.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import chz
import numpy as np

from recollect.configuration import to_json
from recollect.configuration.io import write_json
from recollect.configuration.read_json import read_json_object
from recollect.training.experiment import Experiment, program_of
from recollect.training.run_state import run_directory

Cell = tuple[Any, str]
"""A mixer (the experiment's name, and which of its programs) and a task."""

Group = list[Experiment]
"""Members that share a program."""

Train = Callable[[list[list[Group]]], Iterable[tuple[Group, list[dict[str, Any]], float]]]
"""Trains lists of groups that share a program; yields each group with its results and how many seconds it took."""

FILE = "timings.json"
LEAST = 1e-4
"""Seconds that a time is taken for at least: its logarithm is fitted."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Holds the seconds of a program: to compile it, and per member to start and end a run, for a step and for an
    evaluation."""

    compile: float
    start: float
    step: float
    evaluation: float

    def seconds(self, group: Group) -> float:
        """Returns how long members of this program take, trained one after another or as a population."""
        runs = (
            self.start + run.steps * self.step + math.ceil(run.steps / run.evaluate_every) * self.evaluation
            for run in (member.run for member in group)
        )
        return self.compile + sum(runs)


def estimated_seconds(cells: Mapping[Cell, Group], folder: Path, how: str, train: Train) -> tuple[float, int]:
    """Returns the seconds that all groups take in turn, and how many programs were timed for it.

    Times are kept in `folder`/timings.json, by program and `how` it is trained (device, processes): a study that goes
    on is not timed again.

    Args:
      cells: members that are not trained yet, by mixer and task.
      train: makes the short runs; of a group it may train only the first member.
    """
    path = folder / FILE
    known: dict[str, Any] = read_json_object(path) if path.exists() else {}
    keys = {cell: _digest(group[0], how) for cell, group in cells.items()}
    missing = [cell for cell in chosen(cells) if keys[cell] not in known]
    scratch = folder / "timing"
    try:
        pairs = {keys[cell]: [_short(cells[cell], scratch / keys[cell] / turn) for turn in "12"] for cell in missing}
        first: dict[str, float] = {}
        for group, results, seconds in train(list(pairs.values())):
            key = run_directory(group[0]).parts[-3]
            if key in first:
                known[key] = dataclasses.asdict(_timing(group, results, first[key], seconds))
            first[key] = seconds
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if missing:
        write_json(path, known)
    measured = {cell: Timing(**known[key]) for cell, key in keys.items() if key in known}
    timings = fitted(measured, cells)
    return sum(timings[cell].seconds(group) for cell, group in cells.items()), len(missing)


def chosen(cells: Iterable[Cell]) -> list[Cell]:
    """Returns the cells that are timed: those of the most common mixer and task, and the first of each other one that
    these have no cell of."""
    cells = list(cells)
    mixer, task = (Counter(names).most_common(1)[0][0] for names in zip(*cells, strict=True))
    cross = [cell for cell in cells if cell[0] == mixer or cell[1] == task]
    for cell in cells:
        for axis in (0, 1):
            if all(cell[axis] != other[axis] for other in cross):
                cross.append(cell)
    return cross


def fitted(measured: Mapping[Cell, Timing], cells: Iterable[Cell]) -> dict[Cell, Timing]:
    """Returns the timings of cells: those that were measured, and for the others the fit of the module's docstring."""
    mixers, tasks = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))

    def row(cell: Cell) -> list[float]:
        return [*(float(cell[0] == mixer) for mixer in mixers), *(float(cell[1] == task) for task in tasks)]

    values = np.log(np.maximum([dataclasses.astuple(timing) for timing in measured.values()], LEAST))
    factors = np.linalg.lstsq(np.array([row(cell) for cell in measured]), values)[0]
    return {
        cell: measured[cell] if cell in measured else Timing(*np.exp(np.array(row(cell)) @ factors).tolist())
        for cell in cells
    }


def _digest(member: Experiment, how: str) -> str:
    return hashlib.sha256(f"{to_json(program_of(member))} {how}".encode()).hexdigest()[:16]


def _short(group: Group, folder: Path) -> Group:
    """Returns the group with two device calls of steps, evaluated and saved once."""
    calls = min(2 * group[0].run.steps_per_call, group[0].run.steps)
    every = {"steps": calls, "log_every": calls, "evaluate_every": calls, "checkpoint_every": calls}
    folders = [str(folder / str(index)) for index in range(len(group))]
    runs = [
        chz.replace(member.run, **every, directory=directory, stop_at_accuracy=None)
        for member, directory in zip(group, folders, strict=True)
    ]
    return [chz.replace(member, run=run) for member, run in zip(group, runs, strict=True)]


def _timing(group: Group, results: list[dict[str, Any]], first: float, second: float) -> Timing:
    """Returns the timing of a program from two runs of a group, of which the first took `first` seconds."""
    run, last = group[0].run, results[0]
    step = run.batch_size / last["examples_per_second"]
    trained = sum(result["seconds"] for result in results)
    evaluation = max(0.0, trained / len(group) - run.steps * step)
    return Timing(max(0.0, first - second), max(0.0, second - trained) / len(group), step, evaluation)
