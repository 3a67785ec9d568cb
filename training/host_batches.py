"""Batches that the host reads by number and hands to the devices, split over a mesh."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.data.text.rows.by_number import GlobalBatches
from recollect.models.functional import Params
from recollect.training.distributed.host import current_host
from recollect.training.experiment import Experiment
from recollect.training.sharding import batch_sharding, batch_shardings
from recollect.training.step import Program

_READERS, _BATCHES_AHEAD = 2, 8
_ENDLESS = 2**40


class HostBatches:
    """Batches by number: step s trains on batch s + offset, whatever was run, stopped or restarted before.

    Its public methods are those of `recollect.training.batches.DeviceBatches`.

    Grain reads batches ahead in threads. Each process reads the rows that its own devices hold.

    Attributes:
      waited: seconds that steps have waited for data so far: reading that was not done in time, and handing over to
        devices.

    Raises:
      UserError: the data state belongs to another corpus, or rows cannot be split over the mesh's sequence axis.
    """

    def __init__(self, experiment: Experiment, program: Program, data_state: Any = None):
        self.run = experiment.run
        self.data = experiment.data
        self.program = program
        self.waited = 0.0
        self._offset = 0
        self._reader: Any = None
        self._next = -1
        if data_state is None:
            return
        digest = self.data.corpus_digest() or ""
        if data_state["corpus"] != digest:
            raise UserError(
                f"the checkpoint was trained on corpus {data_state['corpus'][:12]}, "
                f"and the source now holds {digest[:12]}"
            )
        if "offset" not in data_state:
            raise UserError(
                "the checkpoint was written by a version that ordered batches otherwise; "
                "train it anew in another run.directory"
            )
        self._offset = int(data_state["offset"])

    @functools.cached_property
    def batches(self) -> GlobalBatches:
        """The training batches, planned when first asked for."""
        batches = self.data.batches(self.run.seed, self.run.batch_size)
        parts = self.run.mesh.sequence
        for length in batches.row_lengths:
            if length % parts:
                raise UserError(f"run.mesh.sequence={parts}: does not divide rows of {length} tokens")
        return batches

    def steps_ahead(self, step: int, at_most: int) -> int:
        """Returns how many steps the next device call should make, 1 to `at_most`.

        A call's batches have one shape, and each number of steps and shape is a program of its own: with rows of
        several lengths a call is one step, so that there is one program per length.
        """
        return min(at_most, self.run.steps_per_call) if len(self.batches.row_lengths) == 1 else 1

    def train(self, state: Any, values: Any, length: int, step: int) -> tuple[Any, Any]:
        number = step + self._offset
        if number != self._next:
            self._open(number)
        begun = time.perf_counter()
        parts = [next(self._reader) for _ in range(length)]
        self._next = number + length
        placed = place_batches(parts, self.batches.rows(number), self.batches.row_length(number), self.program.mesh)
        self.waited += time.perf_counter() - begun
        return train_on(self.program, state, values, placed)

    def batch(self, step: int, seed: int) -> Batch:
        """Returns the whole batch of the step after `step` steps, the same in every process."""
        number = step + self._offset
        return on_mesh(self.batches.read(number, 0, self.batches.rows(number)), self.program.mesh)

    def skip(self, batches: int) -> None:
        """Leaves out as many batches: the next step trains on what would have come that much later."""
        self._offset += batches

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the data, JSON-ready."""
        return {"corpus": self.data.corpus_digest(), "offset": self._offset}

    def result_entries(self) -> dict[str, Any]:
        """Returns the entries of result.json about the data, and how its documents became rows."""
        return {**self.data.result_entries(), "rows": self.batches.plan.facts()}

    def _open(self, number: int) -> None:
        """Begins to read ahead from batch `number` on."""
        import grain

        batches, mesh = self.batches, self.program.mesh

        def read(number: int) -> Parts:
            ranges = local_rows(batches.rows(number), batches.row_length(number), mesh)
            return {(begin, end): batches.read(number, begin, end) for begin, end in ranges}

        if self._reader is not None:
            self._reader.close()
        options = grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=_BATCHES_AHEAD)
        self._reader = iter(grain.MapDataset.range(number, number + _ENDLESS).map(read).to_iter_dataset(options))


def train_on(program: Program, state: Any, values: Any, batches: Batch) -> tuple[Any, Any]:
    """Trains one step per batch of `batches`, stacked along a leading axis; the state given is consumed. Returns the
    state, and metrics (steps,) by name."""
    assert program.population is None, "host data feeds one member at a time"

    def run(state: Any, values: Any, batches: Batch) -> tuple[Any, Any]:
        return jax.lax.scan(lambda state, batch: program.step(state, values, batch), state, batches)

    return program.jit("train_on", run, donate_argnums=0)(state, values, batches)


Parts = dict[tuple[int, int], Batch]
"""Rows (begin, end) of one batch -> these rows."""


def local_rows(rows: int, length: int, mesh: jax.sharding.Mesh | None) -> list[tuple[int, int]]:
    """Returns the ranges (begin, end) of a batch's rows that this process's devices hold; all without a mesh."""
    if mesh is None:
        return [(0, rows)]
    held = batch_sharding(mesh).addressable_devices_indices_map((rows, length)).values()
    return sorted({index[0].indices(rows)[:2] for index in held if index is not None})


def place_batches(parts: list[Parts], rows: int, length: int, mesh: jax.sharding.Mesh | None) -> Batch:
    """Returns batches of one shape stacked along a leading axis, split over the mesh's devices as the step splits them.

    Args:
      parts: what this process holds of each batch, by `local_rows`.
      rows, length: of a whole batch.
      mesh: None leaves NumPy arrays.
    """
    if mesh is None:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(part[0, rows] for part in parts))
    sharding = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def place(name: str) -> Any:
        if getattr(next(iter(parts[0].values())), name) is None:
            return None

        def shard(index: Any) -> np.ndarray:
            begin, end, _ = index[1].indices(rows)
            return np.stack([getattr(part[begin, end], name)[:, index[2]] for part in parts])

        return jax.make_array_from_callback((len(parts), rows, length), sharding, shard)

    # Text labels every position: there are no target positions.
    return Batch(place("tokens"), place("targets"), None, place("weights"), place("segments"))


def on_mesh(batch: Batch, mesh: jax.sharding.Mesh | None) -> Batch:
    """Returns a batch that every process has whole, split over the mesh as the step splits it; itself without one."""
    if mesh is None:
        return batch

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, batch, batch_shardings(batch, mesh))


def evaluate_on_text(program: Program, params: Params, *, final: bool) -> dict[str, Any]:
    """Returns the metrics of held-out text; `final`: also by slice and against a bigram model."""
    from recollect.evaluation.text_slices import evaluate_text

    def of_batch(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        entropy, out = program.losses_of(params, batch, batch.weights)
        return entropy.loss, program.measured(out)

    evaluate, measured = program.jit("evaluate_on", of_batch), []

    def losses(batch: Batch) -> np.ndarray:
        loss, sums = evaluate(params, on_mesh(batch, program.mesh))
        measured.append(jax.device_get(sums))
        return np.asarray(loss if loss.is_fully_addressable else current_host().whole(loss))

    metrics = evaluate_text(losses, program.data, program.experiment.run.batch_size, final=final)
    totals: Any = jax.tree.map(lambda *parts: float(sum(parts)), *measured)
    return metrics | {name: total / count for name, (total, count) in totals.items()}
