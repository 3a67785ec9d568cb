"""Calls of steps, sent to the devices one ahead of what has been fetched, so that they never wait for the host to
read numbers."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recollect.training.experiment import Experiment
from recollect.training.monitoring.profiling import Profile
from recollect.training.monitoring.throughput import meter_of


@dataclasses.dataclass
class Call:
    """One device call: `length` steps, of which the last is step `end`; `metrics` are (length,) or (members, length) by
    name, on the devices until `Calls.fetch` has them as NumPy arrays. `seconds` is its share of the run's time, known
    then."""

    end: int
    length: int
    metrics: dict[str, Any]
    data_state: Any
    begun: float
    waited: float
    seconds: float = 0.0


class Calls:
    """Trains a state, call by call.

    Attributes:
      state: after the last call sent; its arrays may still be in the making.
      sent, settled: steps given to the devices, and steps whose metrics have been fetched.
      meter: rates so far.
      call_seconds: of a call without compilation; None before there was one.
    """

    def __init__(
        self,
        experiment: Experiment,
        feed: Any,
        values: Any,
        state: Any,
        step: int,
        folder: Path,
        say: Callable[[str], None],
    ):
        self.run = experiment.run
        self.feed = feed
        self.values = values
        self.meter = meter_of(experiment)
        self.profile = Profile(self.run.profile, folder / "profile", say)
        self.call_seconds: float | None = None
        self._members = feed.program.population or 1
        self._lengths: set[int] = set()
        self.restart(state, step)

    def restart(self, state: Any, step: int) -> None:
        """Goes on from another state; calls not fetched yet are forgotten."""
        self.state, self.sent, self.settled = state, step, step
        self._waiting: collections.deque[Call] = collections.deque()
        self._mark = time.perf_counter()

    @property
    def ahead(self) -> int:
        """Calls sent and not fetched."""
        return len(self._waiting)

    def send(self, frozen: np.ndarray) -> Call:
        """Sends the next call. `frozen` (members,) says which members keep their state."""
        begun, waited = time.perf_counter(), self.feed.waited
        run, step = self.run, self.sent
        # Calls end at the same steps whether or not the run was cut off.
        length = self.feed.steps_ahead(step, min(run.steps_per_call - step % run.steps_per_call, run.steps - step))
        keep = jax.tree.map(lambda leaf: leaf.copy(), self.state) if frozen.any() else None
        self.profile.before(step, length)
        self.state, metrics = self.feed.train(self.state, self.values, length, step)
        if keep is not None:
            self.state = _select(frozen, keep, self.state)
        self.sent += length
        call = Call(self.sent, length, metrics, self.feed.state(), begun, self.feed.waited - waited)
        self._waiting.append(call)
        return call

    def fetch(self) -> Call:
        """The oldest call not fetched, once it is done."""
        call = self._waiting.popleft()
        call.metrics = jax.device_get(call.metrics)
        now = time.perf_counter()
        call.seconds = now - max(call.begun, self._mark)
        self._mark = now
        self.settled = call.end
        tokens = call.length * self.run.batch_size * self.feed.tokens_per_example() * self._members
        self.meter.step(call.length, tokens, call.seconds, min(call.waited, call.seconds))
        self.profile.after(call.end)
        if call.length in self._lengths:  # an earlier call had this length, so this one's time holds no compilation
            self.call_seconds = call.seconds
        self._lengths.add(call.length)
        return call

    def pause(self) -> None:
        """What follows until the next call is no part of any call's time."""
        self._mark = time.perf_counter()


def _select(frozen: np.ndarray, old: Any, new: Any) -> Any:
    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.numpy.where(frozen.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, old, new)
