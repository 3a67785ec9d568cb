"""Calls of several steps, sent to the devices one ahead of what was fetched, so that they never wait for the host."""

from __future__ import annotations

import collections
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from recollect.training.run_state import RunState


@dataclasses.dataclass
class Call:
    """One device call of `length` steps, of which the last is step `end`.

    Attributes:
      metrics: by name, (length,) or (members, length); on the devices until the call is fetched, then NumPy arrays.
      data_state: of the batches after it.
      begun, waited: when its data were asked for, and for how many seconds it waited for them.
      seconds: its share of the run's time, known once it is fetched.
    """

    end: int
    length: int
    metrics: dict[str, Any]
    data_state: Any
    begun: float
    waited: float
    seconds: float = 0.0

    def crosses(self, every: int) -> bool:
        """Returns whether a multiple of `every` is among its steps; never for 0."""
        return every > 0 and self.end // every > (self.end - self.length) // every


class StepPipeline:
    """Trains `run.state` call by call.

    Attributes:
      sent, fetched: steps given to the devices, and steps whose metrics have been fetched.
    """

    def __init__(self, run: RunState, values: Any, step: int):
        self.run = run
        self.values = values
        self.restart(step)

    def restart(self, step: int) -> None:
        """Goes on from `step`, with what now is `run.state`; calls not fetched yet are forgotten."""
        self.sent = self.fetched = step
        self._waiting: collections.deque[Call] = collections.deque()
        self._mark = time.perf_counter()

    @property
    def ahead(self) -> int:
        """Calls sent and not fetched."""
        return len(self._waiting)

    def next_length(self) -> int:
        """Returns the steps of the next call. Calls end at the same steps whether or not the run was interrupted."""
        settings, step = self.run.experiment.run, self.sent
        at_most = min(settings.steps_per_call - step % settings.steps_per_call, settings.steps - step)
        return self.run.batches.steps_ahead(step, at_most)

    def send(self, length: int) -> Call:
        """Sends the next call."""
        run, batches = self.run, self.run.batches
        begun, waited = time.perf_counter(), batches.waited
        run.state, metrics = batches.train(run.state, self.values, length, self.sent)
        self.sent += length
        call = Call(self.sent, length, metrics, batches.state(), begun, batches.waited - waited)
        self._waiting.append(call)
        return call

    def fetch(self) -> Call:
        """Returns the oldest call not fetched, once it is done."""
        call = self._waiting.popleft()
        call.metrics = jax.device_get(call.metrics)
        now = time.perf_counter()
        call.seconds = now - max(call.begun, self._mark)
        self._mark = now
        self.fetched = call.end
        return call

    def pause(self) -> None:
        """Counts what follows, until the next call, to no call's time."""
        self._mark = time.perf_counter()
