"""SIGTERM and Ctrl-C as requests, answered between two calls of steps."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from recollect.training.distributed.host import current_host
from recollect.training.hooks import Hook
from recollect.training.run_state import RunState
from recollect.training.step_pipeline import Call


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
        left = self._seconds_left
        when = "once the steps are compiled" if left is None else f"in about {left:.1f} s"
        name = "SIGTERM: " if number == signal.SIGTERM else ""
        print(
            f"{name}stopping after the calls of steps in flight and a checkpoint, {when}; once more stops at once",
            file=sys.stderr,
        )
