"""Training of a sweep's members: in turn, or as a population in one program.

Members of a population differ in values only (`experiment.program_of`). Their states are stacked along a leading axis
and the step is vmapped over it; everything else, from the folder to result.json, each member has for itself, as a run
of its own has. A member that ends early is frozen: its parameters stay what they were, while the others go on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from recollect.configuration.machine import environment
from recollect.models.functional import count
from recollect.training.batches import Call, DeviceBatches, StepPipeline
from recollect.training.checkpoint.resume import delete_unfinished, problem, refuse_if_all_damaged, resume, set_aside
from recollect.training.distributed.host import current_host
from recollect.training.evaluator import evaluate_members
from recollect.training.experiment import Experiment
from recollect.training.hooks import Evaluate, Hook
from recollect.training.monitoring.run_log import RunLog, rates_since_log
from recollect.training.monitoring.throughput import meter_of
from recollect.training.recovery.survival import Recover, SaveCheckpoints, StopOnSignal
from recollect.training.run_folder import is_done
from recollect.training.run_state import RunProgress, RunState, shapes_of
from recollect.training.step import evaluated, member_values, program_for
from recollect.training.train import finish, ignore, prepare, train, train_steps

Log = Callable[[str], None]


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
    log = log if current_host().is_main else ignore
    # The members' checkpoints of one step are not renamed at one moment: with one each, a kill between could leave none
    # in common.
    members = [RunState(experiment, log, max(2, experiment.run.keep_checkpoints)) for experiment in experiments]
    results = [member.result for member in members]
    if all(is_done(result, experiments[0].run.steps) for result in results):
        for member in members:
            log(f"{member.folder.path}: already finished, not trained again")
        return [result for result in results if result is not None]
    for member in members:
        if member.result is None:
            member.folder.unfinish()
    population = Population(members)
    hooks: list[Hook] = [StopOnSignal(), population.meter, EachMember(population)]
    try:
        population.begin()
        train_steps(population, hooks)
        return [_finish(member, population) for member in members]
    finally:
        for hook in reversed(hooks):
            hook.close(population)


class Population(RunState):
    """What the training loop takes for one run: the stacked states of all members, and how far they are.

    Its folder, log and checkpoints are the first member's.
    """

    def __init__(self, members: list[RunState]):
        lead = members[0]
        self.members = members
        self.experiment, self.log, self.folder, self.checkpoints = (
            lead.experiment,
            lead.log,
            lead.folder,
            lead.checkpoints,
        )
        self.progress = RunProgress()
        self.spikes = None
        self.stop_signal = None
        self.program = program_for(lead.experiment, len(members))
        self.meter = meter_of(lead.experiment)

    def begin(self) -> None:
        """Makes fresh states, or loads those of the newest step that all members can go on from."""
        seeds = [member.experiment.run.seed for member in self.members]
        state = self.program.init(seeds)
        for member in self.members:
            member.folder.write("environment.json", environment())
            delete_unfinished(member.checkpoints, self.log)
        step = newest_common(self.members, self.log)
        if step is None:
            for member in self.members:
                member.rewind(0)
            self.state = state
        else:
            shapes = shapes_of(state)
            del state  # what is loaded takes its place on the devices
            self.state, self.progress.step = self._load(step, shapes)
        self.batches = FreezingBatches(self)
        for member in self.members:
            member.program, member.batches, member.meter = self.program, self.batches, self.meter
        values = member_values([member.experiment for member in self.members], True)
        self.pipeline = StepPipeline(self, values, self.progress.step)

    def active(self) -> list[bool]:
        """Returns which members still train."""
        return [member.progress.done is None for member in self.members]

    def of_member(self, tree: Any, index: int) -> Any:
        """Returns one member's part of a stacked tree."""
        return jax.tree.map(lambda leaf: leaf[index], tree)

    def _load(self, common: int, shapes: Any) -> tuple[Any, int]:
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
        steps = [_own_step(member, common) for member in self.members]
        rows = [jax.device_get(resume(member, at, one)) for member, at in zip(self.members, steps, strict=True)]
        state = jax.tree.map(lambda leaf, *leaves: jax.device_put(np.stack(leaves), leaf.sharding), shapes, *rows)
        going_on = [at for at, active in zip(steps, self.active(), strict=True) if active]
        if not going_on:
            self.progress.done = "finished"
        return state, max(going_on, default=0)


class FreezingBatches(DeviceBatches):
    """A task's batches; members that no longer train get their old state back after each call."""

    def __init__(self, population: Population):
        super().__init__(population.experiment, population.program)
        self.population = population

    def train(self, state: Any, values: Any, length: int, step: int) -> tuple[Any, Any]:
        frozen = ~np.array(self.population.active())
        kept = jax.tree.map(lambda leaf: leaf.copy(), state) if frozen.any() else None
        state, metrics = super().train(state, values, length, step)
        return state if kept is None else _select(frozen, kept, state), metrics


class EachMember(Hook):
    """Does for each member what its own hooks would do, with all members evaluated at once."""

    def __init__(self, population: Population):
        self.population = population
        self.logs = [RunLog(member) for member in population.members]
        self.evaluate = [Evaluate(log) for log in self.logs]
        self.recover = [Recover() for _ in self.logs]
        self.save = [SaveCheckpoints() for _ in self.logs]

    def begin(self, run: RunState) -> None:
        members = self.population.members
        self.logs[0].banner(members[0], count(run.state["params"]) // len(members), len(members))

    def after_call(self, run: RunState, call: Call) -> None:
        members = self.population.members
        training = [i for i, one in enumerate(members) if one.progress.done is None and one.progress.failed_at is None]
        rates = rates_since_log(run) if call.crosses(run.experiment.run.log_every) else {}
        for index in training:
            member = members[index]
            member.progress.step = call.end
            member.progress.seconds += call.seconds / len(training)
            own = dataclasses.replace(call, metrics={name: value[index] for name, value in call.metrics.items()})
            self.logs[index].steps(member, own, rates)
            self.recover[index].after_call(member, own)
        self.logs[0].show(run, call)
        for member, save in zip(members, self.save, strict=True):
            save.after_call(member, call)

    def due(self, run: RunState, call: Call) -> bool:
        members = self.population.members
        return any(
            hook.due(member, call)
            for hooks in (self.evaluate, self.save)
            for hook, member in zip(hooks, members, strict=True)
            if member.progress.done is None
        )

    def act(self, run: RunState, call: Call) -> None:
        members, active = self.population.members, self.population.active()
        due = [a and hook.due(one, call) for a, hook, one in zip(active, self.evaluate, members, strict=True)]
        if any(due):
            begun = time.perf_counter()
            seeds = [member.experiment.run.seed for member in members]
            metrics = evaluate_members(run.program, evaluated(run.state), seeds)
            seconds = (time.perf_counter() - begun) / len(members)
            for index in np.flatnonzero(due).tolist():
                self.evaluate[index].record(members[index], metrics[index], seconds)
                if self.recover[index].due(members[index], call):
                    members[index].state = {"params": self.population.of_member(run.state["params"], index)}
                    self.recover[index].act(members[index], call)
        if call.crosses(run.experiment.run.checkpoint_every) or self.population.active() != active:
            self._save_all(run, last=call.end >= run.experiment.run.steps)
        if not any(self.population.active()):
            run.progress.done = "finished"

    def end(self, run: RunState) -> None:
        if run.stop_signal is not None:
            self._save_all(run, last=True)
        for member, save in zip(self.population.members, self.save, strict=True):
            save.end(member)

    def close(self, run: RunState) -> None:
        for member, log, save in zip(self.population.members, self.logs, self.save, strict=True):
            log.close(member)
            save.close(member)

    def _save_all(self, run: RunState, *, last: bool) -> None:
        members = self.population.members
        for member, save in zip(members, self.save, strict=True):
            save.wait(member)  # none is written before all members have the one before
        for index, (member, save) in enumerate(zip(members, self.save, strict=True)):
            member.state = self.population.of_member(run.state, index)
            save.save(member, last=last)
            member.state = None


def newest_common(members: list[RunState], log: Log) -> int | None:
    """Returns the newest step at which all members have a whole checkpoint, None when they never had one.

    Damaged ones are set aside. A member that is done can stand beside the others at any step.
    """
    while True:
        common: set[int] = set.intersection(*(_resumable(member, members) for member in members))
        for member in members:
            refuse_if_all_damaged(member.checkpoints)
        if not common:
            return None
        step = max(common)
        problems = {member: problem(member.checkpoints, _own_step(member, step)) for member in members}
        for member, wrong in problems.items():
            if wrong is not None:
                set_aside(member.checkpoints, _own_step(member, step), wrong, log)
        if not any(problems.values()):
            return step


def _resumable(member: RunState, members: list[RunState]) -> set[int]:
    steps = set(member.checkpoints.steps())
    if member.result is not None and steps:
        return set().union(*(other.checkpoints.steps() for other in members))
    return steps


def _own_step(member: RunState, common: int) -> int:
    steps = member.checkpoints.steps()
    return common if common in steps else max(steps)


def _select(frozen: np.ndarray, old: Any, new: Any) -> Any:
    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.numpy.where(frozen.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, old, new)


def _finish(member: RunState, population: Population) -> dict[str, Any]:
    before = member.result
    if before is not None and (before["steps"], before["status"]) == (member.progress.step, member.progress.done):
        return before
    member.stop_signal = population.stop_signal
    return finish(member, count(population.state["params"]) // len(population.members))
