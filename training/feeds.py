"""How batches reach the step: recall tasks are made on the device inside it, text comes from the host."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from data.batch import Batch
from data.synthetics import MQAR
from data.text import Text
from evaluation.text import evaluate_text
from models.generation import generate
from training.experiment import Experiment
from training.program import Program


def make_feed(experiment: Experiment, program: Program, data_state: Any) -> RecallFeed | TextFeed:
    """The feed of an experiment, continuing from `data_state` when that is not None."""
    if isinstance(experiment.data, MQAR):
        return RecallFeed(experiment, experiment.data, program)
    assert isinstance(experiment.data, Text)
    return TextFeed(experiment, experiment.data, program, data_state)


class RecallFeed:
    """Batches are a pure function of (seed, step): there is no data state."""

    def __init__(self, experiment: Experiment, data: MQAR, program: Program):
        self.experiment = experiment
        self.data = data
        self.program = program

    def train(self, state: Any, values: Any, length: int, step: int) -> tuple[Any, Any]:
        call = step // self.experiment.run.steps_per_call
        # One slice a call, so that one compiled program serves it; the draw is the same for all members of a population.
        return self.program.train(state, values, length, self.data.slice_for(0, call))

    def evaluate(self, params: Any, seeds: list[int], final: bool = False) -> list[dict[str, Any]]:
        """Accuracy and loss by slice for each member; `accuracy` is the mean over slices."""
        members = self.program.population or 1
        rows: list[dict[str, Any]] = [{"accuracy_by_slice": {}, "loss_by_slice": {}} for _ in range(members)]
        for part in self.data.evaluation_slices():
            seed = seeds[0] if self.program.population is None else seeds
            sums = jax.device_get(self.program.evaluate(params, seed, self.data.evaluation_examples, part))
            for index in range(members):
                loss, correct, weight = (float(np.reshape(sums[name], -1)[index]) for name in ("loss", "correct", "weight"))
                rows[index]["accuracy_by_slice"][part.name] = correct / weight
                rows[index]["loss_by_slice"][part.name] = loss / weight
        return [{"accuracy": _mean(row["accuracy_by_slice"]), "loss": _mean(row["loss_by_slice"]), **row} for row in rows]

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
    """Packed text from Grain; the iterator's state travels with the checkpoints."""

    def __init__(self, experiment: Experiment, data: Text, program: Program, data_state: Any):
        self.experiment = experiment
        self.data = data
        self.program = program
        self.iterator = data.train_iterator(experiment.run.seed, experiment.run.batch_size)
        if data_state is not None:
            self.iterator.set_state(data_state)

    def train(self, state: Any, values: Any, length: int, step: int) -> tuple[Any, Any]:
        batches: list[Batch] = [next(self.iterator) for _ in range(length)]
        return self.program.train_on(state, values, jax.tree.map(lambda *leaves: np.stack(leaves), *batches))

    def evaluate(self, params: Any, seeds: list[int], final: bool = False) -> list[dict[str, Any]]:
        """Bits a byte on held-out documents; at the end of a run also by slice, and the bigram model's."""

        def losses(batch: Batch) -> np.ndarray:
            return np.asarray(self.program.evaluate_on(params, batch)["loss"])

        return [evaluate_text(losses, self.data, self.experiment.run.batch_size, final=final)]

    def state(self) -> Any:
        return self.iterator.get_state()

    def lengths(self) -> list[int]:
        return [self.data.length]

    def tokens_per_example(self) -> float:
        return float(self.data.length)

    def facts(self) -> dict[str, Any]:
        return {"corpus": self.data.describe()}

    def sample(self, params: Any, step: int) -> str:
        prompt = self.data.prompt(seed=step)
        tokens = generate(self.program.model, params, np.array([prompt]), 120, temperature=0.8, top_p=0.95, seed=step)
        return repr(self.data.decode(prompt)) + " -> " + repr(self.data.decode(tokens[0]))


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
