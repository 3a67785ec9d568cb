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
    """Traces the device calls that hold steps of the window; written to FOLDER, for xprof (or TensorBoard with its
    profile plugin).

    """

    def __init__(self, window: str, folder: Path, log: Callable[[str], None]):
        self.window: tuple[int, int] | None = parse_window(window)
        self.folder = Path(folder)
        self.log = log
        self.first: int | None = None

    def before_call(self, run: RunState, length: int) -> None:
        self.before(run.pipeline.sent, length)

    def after_call(self, run: RunState, call: Call) -> None:
        self.after(call.end)

    def close(self, run: RunState | None = None) -> None:
        """Ends a trace that the run did not get to the end of."""
        if self.first is not None and self.window is not None:
            self._stop(f"steps from {self.first + 1} on")

    def before(self, step: int, steps: int) -> None:
        """Before a call of `steps` steps that begins after step `step`."""
        if self.window is None or self.first is not None:
            return
        begin, end = self.window
        if step < end and step + steps > begin:
            jax.profiler.start_trace(str(self.folder))
            self.first = step

    def after(self, step: int) -> None:
        """After that call, whose results have arrived; `step` steps are done."""
        if self.first is not None and self.window is not None and step >= self.window[1]:
            self._stop(f"steps {self.first + 1} to {step}")

    def _stop(self, what: str) -> None:
        jax.profiler.stop_trace()
        self.window = None
        self.log(
            f"  trace of {what}: {self.folder}; to look at it: pip install xprof, then xprof --port 8791 {self.folder}"
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
