"""SIGTERM and Ctrl-C as requests that the loop answers between two calls of steps."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from recollect.training.distributed.processes import process_count, stop_together

GO_ON, INTERRUPTED, TERMINATED = 0, 1, 2


class StopRequests:
    """While entered, SIGTERM and SIGINT are noted instead of ending the process; a second one ends it at once.

    Attributes:
      seconds_left: how long a stop takes from now by what was measured so far (calls of steps in flight, one save); the
        loop keeps it.
      since: time.monotonic() of the request, None before there is one.
    """

    def __init__(self) -> None:
        self.seconds_left: float | None = None
        self.since: float | None = None
        self._request = GO_ON
        self._old: dict[int, Any] = {}

    def decision(self, settled: int, sent: int, name: str) -> int:
        """GO_ON, INTERRUPTED or TERMINATED: whether no further call of steps is to be sent. Every process of a run must
        ask, after each call.

        Args:
          settled: steps whose results have been fetched. A process that got a signal notes `sent`, and all stop once
            they have settled more than that: they could not without a call that it sent after its note, so by then all
            have seen it.
          sent: steps given to the device.
          name: of the run.
        """
        if self._request != GO_ON:
            stop_together(sent, True, name)
        if process_count() == 1:
            return self._request
        stop = stop_together(settled, False, name)
        return (self._request or TERMINATED) if stop else GO_ON

    def __enter__(self) -> StopRequests:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            self._old = {}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        self._request = TERMINATED if number == signal.SIGTERM else INTERRUPTED
        self.since = time.monotonic()
        signal.signal(number, self._old[number])
        when = "once the steps are compiled" if self.seconds_left is None else f"in about {self.seconds_left:.1f} s"
        name = "SIGTERM: " if number == signal.SIGTERM else ""
        print(
            f"{name}stopping after the calls of steps in flight and a checkpoint, {when}; once more stops at once",
            file=sys.stderr,
        )
