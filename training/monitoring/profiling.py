"""A trace of some of a run's steps, by jax's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax

from recollect.configuration import UserError
from recollect.training.batches import Call
from recollect.training.hooks import Hook
from recollect.training.run_state import RunState


class Profile(Hook):
    """Traces the device calls that hold steps of the window; written to `folder`, for xprof (or TensorBoard with its
    profile plugin)."""

    def __init__(self, window: str, folder: Path, log: Callable[[str], None]):
        self.begins, self.ends = parse_window(window)
        self.folder = folder
        self.log = log
        self.first: int | None = None  # the step before those traced, while they are
        self.written = False

    def before_call(self, run: RunState, length: int) -> None:
        sent = run.pipeline.sent
        if not self.written and self.first is None and sent < self.ends and sent + length > self.begins:
            jax.profiler.start_trace(str(self.folder))
            self.first = sent

    def after_call(self, run: RunState, call: Call) -> None:
        if self.first is not None and call.end >= self.ends:
            self._write(f"steps {self.first + 1} to {call.end}")

    def close(self, run: RunState) -> None:
        """Ends a trace that the run did not get to the end of."""
        if self.first is not None:
            self._write(f"steps from {self.first + 1} on")

    def _write(self, steps: str) -> None:
        jax.profiler.stop_trace()
        self.first, self.written = None, True
        self.log(
            f"  trace of {steps}: {self.folder}; to look at it: pip install xprof, then xprof --port 8791 {self.folder}"
        )


def parse_window(text: str) -> tuple[int, int]:
    """Returns (10, 15) for "10:15": the steps after step 10, up to step 15.

    Raises:
      UserError: it is no such pair, or an empty one.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(
            f"run.profile={text!r}: the form is FIRST:LAST, for example 10:15 for the steps after step 10 up to step 15"
        )
    return int(match[1]), int(match[2])
