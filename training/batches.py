"""Calls of several steps: where their batches come from, and how they are sent, one ahead of what was fetched, so that
the devices never wait for the host. Batches that the host reads: host_batches.py."""

from __future__ import annotations

import collections
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from recollect.configuration.console import doing
from recollect.data.batch import Batch
from recollect.training.experiment import Experiment, program_of
from recollect.training.step import Program

if TYPE_CHECKING:
    from recollect.training.host_batches import HostBatches
    from recollect.training.run_state import RunState


def open_batches(experiment: Experiment, program: Program, data_state: Any = None) -> DeviceBatches | HostBatches:
    """Returns the batches of an experiment, continuing from `data_state` when that is not None; raises UserError where
    that belongs to another corpus."""
    if experiment.data.made_on_device:
        return DeviceBatches(experiment, program)
    from recollect.training.host_batches import HostBatches

    return HostBatches(experiment, program, data_state)


class DeviceBatches:
    """Batches that are a pure function of (seed, step): there is no data state, and nothing to wait for."""

    waited = 0.0
    """Seconds that steps have waited for data so far."""

    def __init__(self, experiment: Experiment, program: Program):
        self.run = experiment.run
        self.data: Any = experiment.data
        self.program = program

    def steps_ahead(self, step: int, at_most: int) -> int:
        """Returns how many steps the next device call should make, 1 to `at_most`."""
        return min(at_most, self.run.steps_per_call)

    def train(self, state: Any, values: Any, length: int, step: int) -> tuple[Any, Any]:
        """Starts `length` steps from step `step` on; returns the state after them and their metrics."""
        return self.program.train(state, values, length, self._slice(step))

    def batch(self, step: int, seed: int) -> Batch:
        """Returns the whole batch of the step after `step` steps."""
        return self.data.train_batch(jnp.uint32(seed), jnp.int32(step), self._slice(step), self.run.batch_size)

    def state(self) -> Any:
        """Returns what a checkpoint keeps of the data, JSON-ready."""
        return None

    def result_entries(self) -> dict[str, Any]:
        """Returns the entries of result.json that describe the data."""
        return self.data.result_entries()

    def _slice(self, step: int) -> Any:
        # One slice per call, so that one compiled program serves it; all members of a population draw the same.
        return self.data.slice_for(0, step // self.run.steps_per_call)


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
    """Trains `run.state` call by call: `sent` steps were given to the devices, the metrics of `fetched` are here."""

    def __init__(self, run: RunState, values: Any, step: int):
        self.run = run
        self.values = values
        self._lengths: set[int] = set()
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
        if length not in self._lengths:
            doing("compiling the steps", None, lambda: (program_of(run.experiment), length, self.values))
        run.state, metrics = batches.train(run.state, self.values, length, self.sent)
        self.sent += length
        if length not in self._lengths:
            self._lengths.add(length)
            doing(f"steps up to {self.sent:,}")
        self._waiting.append(Call(self.sent, length, metrics, batches.state(), begun, batches.waited - waited))
        return self._waiting[-1]

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
