"""Training of a sweep's members: in turn, or as a population in one program.

Members of a population differ in values only (`experiment.program_of`). Their states are stacked along a leading axis
and the step is vmapped over it; everything else, from the folder to result.json, each member has for itself, as a run
of its own has. A member that ends early is saved as it is then: what the program goes on to compute in its place, while
the others train, counts for nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from recollect.models.functional import count
from recollect.training.batches import Call, StepPipeline, open_batches
from recollect.training.checkpoint.resume import delete_unfinished, newest_good, resume, rewind
from recollect.training.distributed.host import current_host
from recollect.training.evaluator import evaluate_members
from recollect.training.experiment import Experiment
from recollect.training.hooks import Evaluate, Hook, Recover, SaveCheckpoints, StopOnSignal
from recollect.training.monitoring.run_log import RunLog, meter_of, rates_since_log
from recollect.training.recovery.run_lock import locked
from recollect.training.run_folder import is_done
from recollect.training.run_state import Log, RunProgress, RunState, run_directory, shapes_of
from recollect.training.step import evaluated, member_values, program_for
from recollect.training.train import finish, prepare, train, train_steps


def train_members(experiments: list[Experiment], *, together: bool, log: Log = print) -> list[dict[str, Any]]:
    """Trains members of a sweep in turn, or at once in one program (`together`); returns their results.

    Members that are done are not trained again. After SIGTERM the results end with the preempted one.
    """
    if together:
        return train_population(experiments, log)
    results: list[dict[str, Any]] = []
    for experiment in experiments:
        results.append(train(experiment, log))
        if results[-1]["status"] == "preempted":
            break
    return results


def train_population(experiments: list[Experiment], log: Log = print) -> list[dict[str, Any]]:
    """Trains experiments that differ in values only, in one program; returns their results. Raises as `train` does."""
    prepare(experiments)
    with locked(*map(run_directory, experiments)):
        return _train_population(experiments, log if current_host().is_main else lambda text: None)


def _train_population(experiments: list[Experiment], log: Log) -> list[dict[str, Any]]:
    # The members' checkpoints of one step are not renamed at one moment: with one each, a kill between could leave none
    # in common.
    members = [RunState(experiment, log, max(2, experiment.run.keep_checkpoints)) for experiment in experiments]
    left = [member for member in members if not is_done(member.result, member.experiment.run.steps)]
    for member in members:
        if member not in left:
            steps = (member.result or {})["steps"]
            asked = f"with {steps:,} steps, run.steps={member.experiment.run.steps:,}"
            log(f"{member.folder.path}: already finished ({asked}), not trained again")
    if left:
        _train_together(left)
    return [member.result or {} for member in members]


def _train_together(members: list[RunState]) -> None:
    """Trains members to their ends, or to where a signal stops them, and sets their results."""
    # What the training loop takes for one run: stacked states, and the folder and the log of the first member.
    population = copy.copy(members[0])
    population.progress = RunProgress()
    population.program = program_for(population.experiment, len(members))
    population.meter = meter_of(population.experiment)
    hooks: list[Hook] = [StopOnSignal(), population.meter, EachMember(members)]
    try:
        begin(population, members)
        train_steps(population, hooks)
        for member in members:
            member.stop_signal = population.stop_signal
            member.result = finish(member, count(population.state["params"]) // len(members))
    finally:
        for hook in reversed(hooks):
            hook.close(population)


def begin(population: RunState, members: list[RunState]) -> None:
    """Makes fresh states, or loads those of the newest step that all members can go on from."""
    for member in members:
        member.folder.unfinish()
        member.folder.write_environment()
        delete_unfinished(member.checkpoints, member.log)
    step = newest_common(members)
    population.state = population.program.init([member.experiment.run.seed for member in members])
    if step is None:
        for member in members:
            rewind(member, 0)
        if any(member.experiment.run.initialize for member in members):
            population.state = _initialized(population.state, members)
    else:
        shapes = shapes_of(population.state)
        population.state = None  # what is loaded takes its place on the devices
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
        rows = [jax.device_get(resume(member, step, one)) for member in members]
        population.state = jax.tree.map(
            lambda leaf, *leaves: jax.device_put(np.stack(leaves), leaf.sharding), shapes, *rows
        )
        population.progress.step = step
        population.progress.done = "finished" if all(member.progress.done for member in members) else None
    population.batches = open_batches(population.experiment, population.program)
    for member in members:
        member.program, member.batches, member.meter = population.program, population.batches, population.meter
    values = member_values([member.experiment for member in members], True)
    population.pipeline = StepPipeline(population, values, population.progress.step)


def _initialized(state: Any, members: list[RunState]) -> Any:
    """Returns the stacked fresh state with the parameters that members begin with (`run.initialize`)."""
    from recollect.training.checkpoint.initialize import initialized

    rows = [_row_of(state, row) for row in range(len(members))]
    pairs = zip(members, rows, strict=True)
    rows = [initialized(member, row) if member.experiment.run.initialize else row for member, row in pairs]
    return jax.tree.map(
        lambda leaf, *leaves: jax.device_put(np.stack(jax.device_get(leaves)), leaf.sharding), state, *rows
    )


def newest_common(members: list[RunState]) -> int | None:
    """Returns the newest step of which all members have a whole checkpoint, None where there is none."""
    before = None
    while True:
        steps = {newest_good(member.checkpoints, member.log, before) for member in members}
        if len(steps) == 1:
            return steps.pop()
        if None in steps:
            return None
        before = 1 + min(step for step in steps if step is not None)


class EachMember(Hook):
    """Does for each member what its own hooks would do, with all members evaluated at once."""

    def __init__(self, members: list[RunState]):
        self.logs = {member: RunLog(member) for member in members}
        self.evaluate = {member: Evaluate(log) for member, log in self.logs.items()}
        self.saves = {member: SaveCheckpoints() for member in members}
        self.recover = Recover()
        self.last: dict[RunState, tuple[Call, dict[str, float]]] = {}

    def training(self) -> dict[RunState, int]:
        """Returns the members that still train, and which row of the stacked arrays is theirs."""
        return {member: row for row, member in enumerate(self.logs) if member.progress.done is None}

    def begin(self, run: RunState) -> None:
        first, log = next(iter(self.logs.items()))
        log.begin(first, count(run.state["params"]) // len(self.logs), len(self.logs))

    def after_call(self, run: RunState, call: Call) -> None:
        training = {member: row for member, row in self.training().items() if member.progress.failed_at is None}
        rates = rates_since_log(run) if call.crosses(run.experiment.run.log_every) else {}
        for member, row in training.items():
            member.progress.step = call.end
            member.progress.seconds += call.seconds / len(training)
            own = dataclasses.replace(call, metrics={name: values[row] for name, values in call.metrics.items()})
            self.logs[member].steps(member, own, rates)
            self.last[member] = own, rates
            self.recover.after_call(member, own)
        next(iter(self.logs.values())).show(run, call)
        for member, save in self.saves.items():
            save.after_call(member, call)

    def due(self, run: RunState, call: Call) -> bool:
        return any(
            hook.due(member, call) for member in self.training() for hook in (self.evaluate[member], self.saves[member])
        )

    def act(self, run: RunState, call: Call) -> None:
        training = self.training()
        due = [member for member in training if self.evaluate[member].due(member, call)]
        if due:
            begun = time.perf_counter()
            seeds = [member.experiment.run.seed for member in self.logs]
            metrics = evaluate_members(run.program, evaluated(run.state), seeds)
            seconds = (time.perf_counter() - begun) / len(self.logs)
            for member in due:
                row = training[member]
                self.evaluate[member].record(member, metrics[row], seconds)
                if self.recover.due(member, call):
                    member.state = {"params": _row_of(run.state["params"], row)}
                    self.recover.act(member, call)
        if call.crosses(run.experiment.run.checkpoint_every) or self.training() != training:
            self._save(run, training, last=call.end >= run.experiment.run.steps)
        if not self.training():
            run.progress.done = "finished"

    def end(self, run: RunState) -> None:
        for member, (own, rates) in self.last.items():
            if own.end % member.experiment.run.log_every:
                self.logs[member].steps(member, own, rates, every=own.end)
        if run.stop_signal is not None:
            self._save(run, self.training(), last=True)
        for member, save in self.saves.items():
            save.end(member)

    def close(self, run: RunState) -> None:
        for member, log in self.logs.items():
            log.close(member)
            self.saves[member].close(member)

    def _save(self, run: RunState, training: dict[RunState, int], *, last: bool) -> None:
        """Saves all members. One that has ended keeps its state, so that a full disk can be tried again later."""
        for member, save in self.saves.items():
            save.wait(member)  # none is written before all members have the one before
        for member, save in self.saves.items():
            if member in training:
                member.state = _row_of(run.state, training[member])
            save.save(member, last=last)
            if member.progress.done is None:
                member.state = None


def _row_of(tree: Any, row: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[row], tree)
