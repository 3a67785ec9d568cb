"""Hooks by which a run survives: SIGTERM and Ctrl-C as requests, steps that are not finite, checkpoints, full disks."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.disk_full import DiskFull
from recollect.training.batches import Call
from recollect.training.distributed.host import current_host
from recollect.training.hooks import Hook
from recollect.training.run_state import RunState


class StopOnSignal(Hook):
    """From its making to `close`, notes SIGTERM and SIGINT instead of ending the process; a second one ends it."""

    def __init__(self) -> None:
        self._signal: str | None = None
        self._since = 0.0
        self._seconds_left: float | None = None
        self._lengths: set[int] = set()
        self._handlers: dict[int, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            self._handlers = {}

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
        print(
            f"{name}stopping after the calls of steps in flight and a checkpoint, {when}; once more stops at once",
            file=sys.stderr,
        )


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
