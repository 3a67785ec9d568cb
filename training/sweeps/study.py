"""Training of a study: every experiment at every point, finished members skipped, one folder per member."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from recollect.configuration import Preempted, UserError, to_json
from recollect.configuration.machine import cpu_count
from recollect.evaluation.metrics import metric_of
from recollect.training.experiment import Experiment, program_of
from recollect.training.run_folder import is_done, read_result
from recollect.training.run_state import run_directory
from recollect.training.sweeps.member_folders import members
from recollect.training.sweeps.population import train_members

WORTH_PROCESSES = 30.0
"""Seconds of training left from which on a second process pays for its start: imports, then compilation."""


def run_study(
    experiments: list[Experiment],
    sweep: tuple[dict[str, Any], ...],
    folder: Path,
    *,
    together: bool | None = None,
    at_once: int | None = 1,
    definitions: Sequence[Path] = (),
    estimate: bool = False,
    log: Callable[[str], None] = print,
) -> list[Path]:
    """Trains what is not finished; returns all members' folders.

    Args:
      together: train members that differ in values only at once, in one compiled program; None: on accelerators (on a
        CPU, members in turn are faster).
      at_once: processes that train members (each imports the script that calls this). None: two on a CPU with at least
        two cores, once a run was trained and by its time the rest takes more than `WORTH_PROCESSES` seconds; else one.
      definitions: files of the user's that define config classes, for these processes.
      estimate: log how long it will take before it begins (see estimate.py); then `at_once` None may mean two from the
        start.

    Raises:
      UserError: a member cannot be trained.
      Preempted: SIGTERM came, and the members in training were saved.
    """
    if at_once is not None and at_once < 1:
        raise UserError(f"--at-once {at_once}: at least one process has to train")
    if together and at_once not in (None, 1):
        raise UserError(f"--at-once {at_once} and --together: members train in several processes or in one program")
    if together is None:
        together = jax.default_backend() != "cpu"
    rows = members(experiments, sweep, folder)
    everyone = [member for row in rows for member in row]
    if repeated := [one for one, many in Counter(map(run_directory, everyone)).items() if many > 1]:
        raise UserError(f"{repeated[0]}: two runs of the study would share this folder; give experiments other names")
    programs = [group for row in rows for group in groups(row)]
    tasks = programs if together else [[member] for group in programs for member in group]
    finished = {run_directory(member) for member in everyone if is_finished(member)}
    left = [[member for member in group if run_directory(member) not in finished] for group in programs]
    progress = StudyProgress(len(everyone), log)
    expected = _estimate(rows, finished, folder, together, at_once, definitions, log) if estimate else 0.0
    while tasks:
        seconds = max(expected, progress.seconds(tasks))
        processes = at_once or (2 if cpu_count() > 1 and seconds > WORTH_PROCESSES else 1)
        waiting = {run_directory(task[0]) for task in tasks}
        todo = [[member for member in group if run_directory(member) in waiting] for group in left]
        if processes > 1 and sum(map(len, todo)) > 1 and not together:
            _train_in_processes(todo, processes, definitions, progress, log)
            tasks = [task for task in tasks if run_directory(task[0]) in finished]
            continue
        task = tasks.pop(0)
        begun = time.monotonic()
        progress.begin(task)
        results = train_members(task, together=together and len(task) > 1, log=log)
        if any(result["status"] == "preempted" for result in results):
            raise Preempted(f"{folder}: preempted")
        progress.end(len(task), time.monotonic() - begun)
    return [run_directory(member) for member in everyone]


def _estimate(
    rows: list[list[Experiment]],
    finished: set[Path],
    folder: Path,
    together: bool,
    at_once: int | None,
    definitions: Sequence[Path],
    log: Callable[[str], None],
) -> float:
    """Logs how long what is left of a study will take; returns the seconds."""
    from recollect.training.sweeps.estimate import estimated_seconds

    cells = {}
    for row in rows:
        for index, group in enumerate(groups(row)):
            if left := [member for member in group if run_directory(member) not in finished]:
                cells[(left[0].name, index), left[0].task] = left
    if not cells:
        return 0.0
    processes = 1 if together else at_once or min(2, cpu_count())
    how = f"{jax.devices()[0].device_kind}, {processes} process{'es' * (processes > 1)}{', together' * together}"

    def train(pairs: list[list[list[Experiment]]]) -> Iterator[tuple[list[Experiment], list[dict[str, Any]], float]]:
        if processes > 1:
            from recollect.training.sweeps.processes import train_in_processes

            firsts = [[group[0] for group in pair] for pair in pairs]
            for member, result, seconds in train_in_processes(firsts, processes, definitions, lambda text: None):
                yield [member], [result], seconds
            return
        for group in itertools.chain.from_iterable(pairs):
            some, begun = group if together else group[:1], time.monotonic()
            results = train_members(some, together=len(some) > 1, log=lambda text: None)
            yield some, results, time.monotonic() - begun

    runs, begun = sum(map(len, cells.values())), time.monotonic()
    seconds, timed = estimated_seconds(cells, folder, how, train)
    source = (
        f"{timed} of {len(cells)} programs timed in {minutes(time.monotonic() - begun)}" if timed else "timed before"
    )
    log(f"runs to train: {runs}, about {hours(seconds / processes)} ({source}; {how})")
    return seconds


def _train_in_processes(
    groups: list[list[Experiment]],
    processes: int,
    definitions: Sequence[Path],
    progress: StudyProgress,
    log: Callable[[str], None],
) -> None:
    from recollect.training.sweeps.processes import train_in_processes

    count = sum(map(len, groups))
    log(f"{count} runs in {min(processes, count)} processes at once")
    begun = time.monotonic()
    for done, (member, result, _) in enumerate(train_in_processes(groups, processes, definitions, log), 1):
        name = metric_of(result)
        score = f"{name} {result[name]:.4g}" if name and result.get(name) else ""
        each = (time.monotonic() - begun) / done
        left = f"; about {minutes(each * (count - done))} left" if done < count else ""
        progress.done += 1
        log(f"run {progress.done} of {progress.total} {result['status']}: {_label(member)} {score}".rstrip() + left)


class StudyProgress:
    """How far a study is, and how long the rest takes by the mean of the runs that were trained."""

    def __init__(self, total: int, log: Callable[[str], None]):
        self.total, self.done, self._log = total, 0, log
        self._trained, self._seconds = 0, 0.0

    def begin(self, task: list[Experiment]) -> None:
        """Logs which runs begin and how long all that are left take."""
        last = f" to {self.done + len(task)}" if len(task) > 1 else ""
        left = f", about {minutes(self.each * (self.total - self.done))} left" if self._trained else ""
        self._log(f"run {self.done + 1}{last} of {self.total}{left}: {_label(task[0])}")

    def end(self, runs: int, seconds: float) -> None:
        """Notes that runs ended; those that were finished before took no time."""
        self.done += runs
        if seconds > 1:
            self._trained, self._seconds = self._trained + runs, self._seconds + seconds

    @property
    def each(self) -> float:
        """Mean seconds of a run that was trained."""
        return self._seconds / max(1, self._trained)

    def seconds(self, tasks: list[list[Experiment]]) -> float:
        """Returns how long tasks take in turn, 0 while no run was trained."""
        return self.each * sum(map(len, tasks))


def minutes(seconds: float) -> str:
    """Returns a duration in words: "40 seconds", "12 minutes", "3 hours"."""
    for size, unit in ((3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= 1.5 * size or size == 1:
            count = max(1, round(seconds / size))
            return f"{count} {unit}{'s' if count > 1 else ''}"
    raise AssertionError


def hours(seconds: float) -> str:
    """Returns a duration in hours, "2.4 hours", and below one in words as `minutes` does."""
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else minutes(seconds)


def is_finished(member: Experiment) -> bool:
    """Returns whether a run has no step left, by its result.json."""
    return is_done(read_result(run_directory(member)), member.run.steps)


def _label(member: Experiment) -> str:
    return f"{member.name} {run_directory(member).name}"


def groups(row: list[Experiment]) -> list[list[Experiment]]:
    """Returns groups of members that compile to one program and draw their data on the device, in order."""
    groups: dict[str, list[Experiment]] = {}
    for member in row:
        key = str(to_json(program_of(member))) if member.data.made_on_device else f"alone {len(groups)}"
        groups.setdefault(key, []).append(member)
    return list(groups.values())
