"""How far a long job has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


class Progress:
    """Shows how far a job is.

    Args:
      total: units of the whole job.
      unit: what is counted: "step", "B".
      log: receives the lines.
      line: template of the lines, with the fields done, total and status.
      seconds: least time between two lines.
      bar: further options of tqdm's bar.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        log: Callable[[str], Any],
        line: str = "  step {done:,}/{total:,} {status}",
        seconds: float = 10.0,
        **bar: Any,
    ):
        self._total, self._unit, self._log, self._line, self._seconds = total, unit, log, line, seconds
        self._options = bar
        self._bar: Any = None
        self._last = -float("inf")

    def update(self, done: int, status: Callable[[], str]) -> None:
        """Shows that `done` units are done, and the status, which is asked for only where it is shown."""
        now = time.monotonic()
        if sys.stderr.isatty():
            import tqdm

            if self._bar is None:
                self._bar = tqdm.tqdm(total=self._total, unit=self._unit, leave=False, **self._options)
            self._bar.update(done - self._bar.n)
            if now - self._last > 1:
                self._last = now
                self._bar.set_postfix_str(status())
        elif now - self._last > self._seconds:
            self._last = now
            self._log(self._line.format(done=done, total=self._total, status=status()))

    def log(self, text: str) -> None:
        """Logs a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        self._log(text)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
