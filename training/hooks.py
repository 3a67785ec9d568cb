"""What happens around the steps of a run, built in one place: `make_hooks`.

A hook sees each call of steps twice. `after_call` has its metrics, while later steps are already being computed. Where
`due`, `act` follows, for which training waits: all metrics are there, and `run.state` is the state after the call.
"""

from __future__ import annotations

import time
from typing import Any

from recollect.training.batches import Call
from recollect.training.evaluator import evaluate
from recollect.training.run_state import RunState
from recollect.training.step import evaluated


class Hook:
    """Does nothing."""

    def begin(self, run: RunState) -> None:
        """Called once before the first call of steps."""

    def before_call(self, run: RunState, length: int) -> None:
        """Called before a call of `length` steps is sent, after step `run.pipeline.sent`."""

    def after_call(self, run: RunState, call: Call) -> None:
        """Called once the call's metrics are there."""

    def due(self, run: RunState, call: Call) -> bool:
        """Returns whether to `act` after this call."""
        return False

    def act(self, run: RunState, call: Call) -> None:
        """Called after a call for which it is `due`."""

    def end(self, run: RunState) -> None:
        """Called once after the last call, in reverse order."""

    def close(self, run: RunState) -> None:
        """Called however training ends, in reverse order."""


def make_hooks(run: RunState) -> list[Hook]:
    """Returns the hooks of a run, in the order in which they are called."""
    from recollect.training.monitoring.run_log import RunLog
    from recollect.training.monitoring.throughput import meter_of
    from recollect.training.recovery.survival import Recover, SaveCheckpoints, StopOnSignal

    settings = run.experiment.run
    run.meter = meter_of(run.experiment)
    run_log = RunLog(run)
    hooks: list[Hook] = [StopOnSignal(), run.meter, run_log, Evaluate(run_log), Recover(), SaveCheckpoints()]
    if settings.profile is not None:
        from recollect.training.monitoring.profiling import Profile

        hooks.insert(1, Profile(settings.profile, run.folder.path / "profile", run.log))
    if settings.sample_every:
        from recollect.training.monitoring.samples import PrintSamples

        hooks.append(PrintSamples())
    return hooks


class Evaluate(Hook):
    """Evaluates each `run.evaluate_every` steps and at the end, and says then whether the run is done."""

    def __init__(self, run_log: Any):
        self.run_log = run_log

    def due(self, run: RunState, call: Call) -> bool:
        settings = run.experiment.run
        failed = run.progress.failed_at is not None
        return call.crosses(settings.evaluate_every) or call.end >= settings.steps or failed

    def act(self, run: RunState, call: Call) -> None:
        begun = time.perf_counter()
        settings = run.experiment.run
        metrics = evaluate(run.program, evaluated(run.state), settings.seed, final=call.end >= settings.steps)
        self.record(run, metrics, time.perf_counter() - begun)

    def record(self, run: RunState, metrics: dict[str, Any], seconds: float) -> None:
        """Logs an evaluation, and ends a run that has failed, reached its goal, or has no steps left."""
        settings, progress = run.experiment.run, run.progress
        progress.evaluation = metrics
        progress.seconds += seconds
        self.run_log.evaluation(run, metrics)
        goal = settings.stop_at_accuracy
        if progress.failed_at is not None:
            progress.done = "diverged"
        elif goal is not None and metrics.get("accuracy", -1.0) >= goal:
            progress.done = "stopped early"
        elif progress.step >= settings.steps:
            progress.done = "finished"
