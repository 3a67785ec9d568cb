"""How batches reach the step: recall tasks are made on the device inside it, text comes from the host."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.data.synthetics import MQAR
from recollect.data.text.dataset import Text
from recollect.data.text.rows.by_number import Batches
from recollect.evaluation.text_slices import evaluate_text
from recollect.models.generation import generate
from recollect.training.experiment import Experiment
from recollect.training.sharding import batch_sharding, batch_shardings
from recollect.training.step import Program

_READERS, _BATCHES_AHEAD = 2, 8
_ENDLESS = 2**40


def make_feed(experiment: Experiment, program: Program, data_state: Any) -> RecallFeed | TextFeed:
    """The feed of an experiment, continuing from `data_state` when that is not None."""
    if isinstance(experiment.data, MQAR):
        return RecallFeed(experiment, experiment.data, program)
    assert isinstance(experiment.data, Text)
    return TextFeed(experiment, experiment.data, program, data_state)


class RecallFeed:
    """Batches are a pure function of (seed, step), made on the device: there is no data state, and nothing to wait
    for."""

    waited = 0.0

    def __init__(self, experiment: Experiment, data: MQAR, program: Program):
        self.experiment = experiment
        self.data = data
        self.program = program

    def train(self, state: Any, values: Any, length: int, step: int) -> tuple[Any, Any]:
        call = step // self.experiment.run.steps_per_call
        # One slice a call, so that one compiled program serves it; the draw is the same for all members of a
        # population.
        return self.program.train(state, values, length, self.data.slice_for(0, call))

    def evaluate(self, params: Any, seeds: list[int], final: bool = False) -> list[dict[str, Any]]:
        """Accuracy and loss by slice for each member; `accuracy` is the mean over slices."""
        members = self.program.population or 1
        rows: list[dict[str, Any]] = [{"accuracy_by_slice": {}, "loss_by_slice": {}} for _ in range(members)]
        for part in self.data.evaluation_slices():
            seed = seeds[0] if self.program.population is None else seeds
            sums = jax.device_get(self.program.evaluate(params, seed, self.data.evaluation_examples, part))
            for index in range(members):
                loss, correct, weight = (
                    float(np.reshape(sums[name], -1)[index]) for name in ("loss", "correct", "weight")
                )
                rows[index]["accuracy_by_slice"][part.name] = correct / weight
                rows[index]["loss_by_slice"][part.name] = loss / weight
        return [
            {"accuracy": _mean(row["accuracy_by_slice"]), "loss": _mean(row["loss_by_slice"]), **row} for row in rows
        ]

    def steps_ahead(self, step: int, at_most: int) -> int:
        """Steps that the next device call should make, 1 to `at_most`."""
        return min(at_most, self.experiment.run.steps_per_call)

    def skip(self, batches: int) -> None:
        """Raises UserError: a recall task's batches are made by step number, so none can be left out."""
        raise UserError("a recall task has no data to skip: its batches are drawn anew at each step")

    def batch(self, step: int, seed: int) -> Batch:
        """The whole batch of the step after `step` steps, for a member's seed."""
        run = self.experiment.run
        part = self.data.slice_for(0, step // run.steps_per_call)
        return self.data.train_batch(jnp.uint32(seed), jnp.int32(step), part, run.batch_size)

    def state(self) -> None:
        return None

    def lengths(self) -> list[int]:
        return sorted({part.length for part in (*self.data.train_slices(), *self.data.evaluation_slices())})

    def tokens_per_example(self) -> float:
        slices = self.data.train_slices()
        return sum(part.length * part.weight for part in slices) / sum(part.weight for part in slices)

    def facts(self) -> dict[str, Any]:
        """For result.json: accuracy of a guess among the values."""
        return {"chance": 1 / (self.data.vocab_size - self.data.vocab_size // 2)}

    def sample(self, params: Any, step: int) -> str:
        return "a recall task has no text to sample"


class TextFeed:
    """Text by batch number: step s trains on batch s + offset, whatever was run, stopped or restarted before.

    Grain reads batches ahead in threads. Each process reads the rows that its own devices hold.

    Attributes:
      waited: seconds that steps have waited for data so far: reading that was not done in time, and handing over to
        devices.

    Raises:
      UserError: the data state belongs to another corpus, or rows cannot be split over the mesh's sequence axis.
    """

    def __init__(self, experiment: Experiment, data: Text, program: Program, data_state: Any):
        self.experiment = experiment
        self.data = data
        self.program = program
        self.waited = 0.0
        self._offset = 0
        self._reader: Any = None
        self._next = -1
        if data_state is not None:
            self._continue(data_state)

    @functools.cached_property
    def batches(self) -> Batches:
        """The training batches; planned when first asked for, as evaluation needs none."""
        run = self.experiment.run
        batches = self.data.batches(run.seed, run.batch_size)
        for length in batches.row_lengths:
            if length % run.mesh.sequence:
                raise UserError(f"run.mesh.sequence={run.mesh.sequence}: does not divide rows of {length} tokens")
        return batches

    def steps_ahead(self, step: int, at_most: int) -> int:
        """Steps that the next device call should make, 1 to `at_most`.

        A call's batches have one shape, and each number of steps and shape is a program of its own: with rows of
        several lengths a call is one step, so that there is one program a length.
        """
        return min(at_most, self.experiment.run.steps_per_call) if len(self.batches.row_lengths) == 1 else 1

    def train(self, state: Any, values: Any, length: int, step: int) -> tuple[Any, Any]:
        number = step + self._offset
        if number != self._next:
            self._open(number)
        begun = time.perf_counter()
        pieces = [next(self._reader) for _ in range(length)]
        self._next = number + length
        placed = place_batches(pieces, self.batches.rows(number), self.batches.row_length(number), self.program.mesh)
        self.waited += time.perf_counter() - begun
        return self.program.train_on(state, values, placed)

    def batch(self, step: int, seed: int) -> Batch:
        """The whole batch of the step after `step` steps, as every process has it."""
        number = step + self._offset
        return self._on_mesh(self.batches.read(number, 0, self.batches.rows(number)))

    def skip(self, batches: int) -> None:
        """Leaves out as many batches: the next step trains on what would have come that much later."""
        self._offset += batches

    def evaluate(self, params: Any, seeds: list[int], final: bool = False) -> list[dict[str, Any]]:
        """Bits a byte on held-out documents; at the end of a run also by slice, and the bigram model's."""

        def losses(batch: Batch) -> np.ndarray:
            found = self.program.evaluate_on(params, self._on_mesh(batch))["loss"]
            if found.is_fully_addressable:
                return np.asarray(found)
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(found, tiled=True))

        return [evaluate_text(losses, self.data, self.experiment.run.batch_size, final=final)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, JSON-ready."""
        return {"corpus": self.data.prepared().digest, "offset": self._offset}

    def lengths(self) -> list[int]:
        return [self.data.length]

    def tokens_per_example(self) -> float:
        return float(self.data.length)

    def facts(self) -> dict[str, Any]:
        """For result.json: the corpus, and how its documents became rows."""
        return {"corpus": self.data.describe(), "rows": self.batches.plan.facts()}

    def sample(self, params: Any, step: int) -> str:
        prompt = self.data.prompt(seed=step)
        tokens = generate(self.program.model, params, np.array([prompt]), 120, temperature=0.8, top_p=0.95, seed=step)
        return repr(self.data.decode(prompt)) + " -> " + repr(self.data.decode(tokens[0]))

    def _continue(self, data_state: Any) -> None:
        digest = self.data.prepared().digest
        if data_state["corpus"] != digest:
            raise UserError(
                f"the checkpoint was trained on corpus {data_state['corpus'][:12]}, and the source now holds {digest[:12]}"
            )
        if "offset" not in data_state:
            raise UserError(
                "the checkpoint was written by a version that ordered batches otherwise; train it anew in another run.directory"
            )
        self._offset = int(data_state["offset"])

    def _open(self, number: int) -> None:
        """Begins to read ahead from batch `number` on."""
        import grain

        batches, mesh = self.batches, self.program.mesh

        def read(number: int) -> Pieces:
            ranges = local_rows(batches.rows(number), batches.row_length(number), mesh)
            return {(begin, end): batches.read(number, begin, end) for begin, end in ranges}

        if self._reader is not None:
            self._reader.close()
        options = grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=_BATCHES_AHEAD)
        self._reader = iter(grain.MapDataset.range(number, number + _ENDLESS).map(read).to_iter_dataset(options))

    def _on_mesh(self, batch: Batch) -> Batch:
        """A batch that every process has whole, split over the mesh as the step's are: each device evaluates its own
        part."""
        mesh = self.program.mesh
        if mesh is None:
            return batch

        def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(place, batch, batch_shardings(batch, mesh))


Pieces = dict[tuple[int, int], Batch]
"""Rows (begin, end) of one batch -> these rows."""


def local_rows(rows: int, length: int, mesh: jax.sharding.Mesh | None) -> list[tuple[int, int]]:
    """Ranges (begin, end) of a batch's rows that this process's devices hold; all without a mesh."""
    if mesh is None:
        return [(0, rows)]
    held = batch_sharding(mesh).addressable_devices_indices_map((rows, length)).values()
    return sorted({index[0].indices(rows)[:2] for index in held if index is not None})


def place_batches(pieces: list[Pieces], rows: int, length: int, mesh: jax.sharding.Mesh | None) -> Batch:
    """Batches of one shape stacked along a leading axis, split over the mesh's devices as the step splits them.

    Args:
      pieces: what this process holds of each batch, by `local_rows`.
      rows, length: of a whole batch.
      mesh: None leaves NumPy arrays.
    """
    if mesh is None:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(piece[0, rows] for piece in pieces))
    sharding = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def place(name: str) -> Any:
        if getattr(next(iter(pieces[0].values())), name) is None:
            return None

        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[1].indices(rows)
            return np.stack([getattr(piece[begin, end], name)[:, index[2]] for piece in pieces])

        return jax.make_array_from_callback((len(pieces), rows, length), sharding, part)

    # Text labels every position: there are no target positions.
    return Batch(place("tokens"), place("targets"), None, place("weights"), place("segments"))


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
