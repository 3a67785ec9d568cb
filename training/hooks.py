"""What happens around the steps of a run, built in one place: `make_hooks`.

A hook sees each call of steps twice. `after_call` has its metrics, while later steps are already being computed. Where
`due`, `act` follows, for which training waits: all metrics are there, and `run.state` is the state after the call.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.disk_full import DiskFull
from recollect.training.batches import Call
from recollect.training.distributed.host import current_host
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
    from recollect.training.monitoring.run_log import RunLog, meter_of

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


class StopOnSignal(Hook):
    """From its making to `close`, notes SIGTERM and SIGINT instead of ending the process; a second one ends it."""

    def __init__(self) -> None:
        self._signal: str | None = None
        self._since = 0.0
        self._seconds_left: float | None = None
        self._lengths: set[int] = set()
        alone = threading.current_thread() is threading.main_thread()  # else whoever runs us there handles signals
        numbers = (signal.SIGTERM, signal.SIGINT) if alone else ()
        self._handlers: dict[int, Any] = {number: signal.signal(number, self._handle) for number in numbers}

    def before_call(self, run: RunState, length: int) -> None:
        """Sets `run.stop_signal` where no further call is to be sent; every process of a run asks after each call.

        A process that got a signal notes the steps it has sent, and all stop once they have fetched more than that:
        they could not without a call that it sent after its note, so by then all have seen it.
        """
        host, name, pipeline = current_host(), str(run.folder.path), run.pipeline
        if self._signal is not None:
            host.stop_together(pipeline.sent, True, name)
        if host.count == 1:
            run.stop_signal = self._signal
        elif host.stop_together(pipeline.fetched, False, name):
            run.stop_signal = self._signal or "SIGTERM"

    def after_call(self, run: RunState, call: Call) -> None:
        if call.length in self._lengths:  # an earlier call had this length, so this one's time holds no compilation
            self._seconds_left = 2 * call.seconds + run.checkpoints.seconds
        self._lengths.add(call.length)

    def end(self, run: RunState) -> None:
        if self._signal == "SIGTERM" and run.stop_signal is not None:
            seconds = time.monotonic() - self._since
            run.log(f"preempted at step {run.progress.step:,}, saved {seconds:.1f} s after SIGTERM")

    def close(self, run: RunState) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        self._signal = signal.Signals(number).name
        self._since = time.monotonic()
        signal.signal(number, self._handlers[number])
        when = f"in about {self._seconds_left:.1f} s" if self._seconds_left else "once the steps are compiled"
        name = "SIGTERM: " if number == signal.SIGTERM else ""
        stopping = f"{name}stopping after the calls of steps in flight and a checkpoint, {when}"
        print(f"{stopping}; once more stops at once", file=sys.stderr)


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


class Recover(Hook):
    """Counts skipped steps, goes back when the loss spikes, and keeps what reproduces a run's failure: nonfinite.py."""

    def after_call(self, run: RunState, call: Call) -> None:
        if run.spikes is None and not call.metrics["skipped"].any():
            run.progress.in_row = 0
            return
        from recollect.training.recovery.nonfinite import observe

        observe(run, call)

    def due(self, run: RunState, call: Call) -> bool:
        return run.progress.failed_at is not None and run.progress.failure is None

    def act(self, run: RunState, call: Call) -> None:
        from recollect.training.recovery.nonfinite import keep_failure

        keep_failure(run, run.state["params"])


class SaveCheckpoints(Hook):
    """Saves each `run.checkpoint_every` steps and where the run ends, in the background."""

    def __init__(self) -> None:
        self._reported = False

    def after_call(self, run: RunState, call: Call) -> None:
        """Reports a full disk as soon as it shows, and again only after there was space in between."""
        if current_host().count == 1 and run.checkpoints.ended():
            self.wait(run)
        if not run.folder.held_back:
            self._reported = False
        elif not self._reported:
            self._reported = True
            with disk_full_ends(run, False):
                run.folder.flush()

    def due(self, run: RunState, call: Call) -> bool:
        return call.crosses(run.experiment.run.checkpoint_every) or run.progress.done is not None

    def act(self, run: RunState, call: Call) -> None:
        self.wait(run)
        self.save(run, last=call.end >= run.experiment.run.steps)

    def wait(self, run: RunState) -> None:
        """Returns once the save before is on the disk, or was given up."""
        with disk_full_ends(run, False):
            run.checkpoints.wait()

    def save(self, run: RunState, *, last: bool) -> None:
        """Starts a save. `last`: no later checkpoint will take its place, so a full disk ends the run."""
        with disk_full_ends(run, last):
            run.folder.flush(to_disk=True)  # a checkpoint promises that all lines before it are on the disk
            run.checkpoints.save(run.progress.step, run.state, run.experiment, run.extra())

    def end(self, run: RunState) -> None:
        if run.stop_signal is not None:
            self.wait(run)
            self.save(run, last=True)
        with disk_full_ends(run, True):
            run.checkpoints.close()

    def close(self, run: RunState) -> None:
        if current_host().count == 1:
            with contextlib.suppress(Exception):  # an error that is on its way out is the one to report
                run.checkpoints.close()


@contextlib.contextmanager
def disk_full_ends(run: RunState, ends: bool) -> Iterator[None]:
    """Raises UserError on a full disk where that `ends` the run, or `run.on_disk_full` is "stop"; else logs a line."""
    try:
        yield
    except DiskFull as error:
        if ends or run.experiment.run.on_disk_full == "stop":
            raise UserError(f"{error}; with space freed the same command goes on from there") from error
        run.log(f"  {error}; going on, trying again at the next checkpoint")
