"""Where a step's batches come from: drawn on the device inside the step, or read on the host (host_batches.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.training.experiment import Experiment
from recollect.training.step import Program

if TYPE_CHECKING:
    from recollect.training.host_batches import HostBatches


def open_batches(experiment: Experiment, program: Program, data_state: Any = None) -> DeviceBatches | HostBatches:
    """Returns the batches of an experiment, continuing from `data_state` when that is not None.

    Raises:
      UserError: the data state belongs to another corpus.
    """
    if experiment.data.made_on_device:
        return DeviceBatches(experiment, program)
    from recollect.training.host_batches import HostBatches

    return HostBatches(experiment, program, data_state)


class DeviceBatches:
    """Batches that are a pure function of (seed, step): there is no data state, and nothing to wait for.

    Attributes:
      waited: seconds that steps have waited for data so far.
    """

    waited = 0.0

    def __init__(self, experiment: Experiment, program: Program):
        self.run = experiment.run
        self.data = experiment.data
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

    def skip(self, batches: int) -> None:
        """Raises UserError: batches are made by step number, so none can be left out."""
        raise UserError("a recall task has no data to skip: its batches are drawn anew at each step")

    def state(self) -> Any:
        """Returns what a checkpoint keeps of the data, JSON-ready."""
        return None

    def result_entries(self) -> dict[str, Any]:
        """Returns the entries of result.json that describe the data."""
        return self.data.result_entries()

    def _slice(self, step: int) -> Any:
        # One slice per call, so that one compiled program serves it; all members of a population draw the same.
        return self.data.slice_for(0, step // self.run.steps_per_call)
