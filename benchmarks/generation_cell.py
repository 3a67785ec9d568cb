"""One row of `bench generation`: a model with random weights at one length and batch, compiled and timed."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect import layers
from recollect.benchmarks import timing
from recollect.configuration import UserError
from recollect.models import FunctionalModel, LanguageModel, count, state_bytes
from recollect.models.generation import PIECE, Generation, chunk_of, programs_of
from recollect.models.language_model import DTYPES
from recollect.models.sampling import Sampling
from recollect.training.monitoring.chips import chip_of

GREEDY = Sampling(temperature=0)
KEPT_FREE = 0.12
"""Share of the free memory that the largest batch's state leaves to activations."""


class Subject:
    """A model with random weights, made on the device in the dtype of its activations."""

    def __init__(self, name: str, config: LanguageModel, vocabulary: int):
        self.name, self.config = name, config
        self.model = FunctionalModel(config, vocabulary)
        self.programs = programs_of(self.model, GREEDY)
        dtype = DTYPES[config.dtype]
        self.make: Any = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), self.model.init(key)))
        self.shapes = jax.eval_shape(self.make, jax.random.key(0))
        self.params: Any = None

    def facts(self) -> dict[str, Any]:
        """Returns what is the same in every row."""
        return {
            "name": self.name,
            "mixer": type(self.config.mixers[0]).__name__,
            "attention": all(type(mixer) is layers.Attention for mixer in self.config.mixers),
            "parameters": count(self.shapes),
            "parameter_bytes": state_bytes(self.shapes),
            "vocabulary": self.model.vocabulary,
            "dtype": self.config.dtype,
        }

    def compile(self) -> None:
        """Compiles what makes the weights."""
        if hasattr(self.make, "lower"):
            self.make = self.make.lower(jax.random.key(0)).compile()

    def state(self, rows: int, length: int) -> Any:
        """Returns shapes and dtypes of the state of some rows."""
        return jax.eval_shape(lambda params: self.model.bind(params).init_state(rows, length), self.shapes)


class Cell:
    """One row: a model at one length and batch.

    Args:
      asked: a number of rows, or "largest".
    """

    def __init__(self, subject: Subject, length: int, asked: str, pieces: int, prefill_rows: int):
        self.subject, self.length, self.pieces = subject, length, pieces
        self.tokens = PIECE * (1 + pieces)
        rows = self.largest_batch() if asked == "largest" else int(asked)
        self.prefill_rows = min(rows, prefill_rows)
        self.row: dict[str, Any] = {**subject.facts(), "length": length, "asked": asked, "rows": rows, "attempts": 1}
        self.compiled: dict[str, Any] = {}

    def compile(self, what: str) -> None:
        """Compiles "decode" or "prefill"; several cells may do so at once."""
        subject, int32 = self.subject, functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
        if what == "decode":
            carry, keys, values = jax.eval_shape(self.start, subject.shapes)
            numbers = (int32((self.row["rows"],)), int32(()), int32(()))
            lowered = subject.programs.decode.lower(subject.shapes, carry, keys, values, *numbers)
        else:
            tokens = int32((self.prefill_rows, chunk_of(self.length - self.tokens)))
            state = subject.state(self.prefill_rows, self.length)
            lowered = subject.programs.prefill.lower(subject.shapes, state, tokens, tokens)
        self.compiled[what] = lowered.compile()

    def measure(self, what: str) -> None:
        """Measures "decode" or "prefill" into the row; what fails leaves its error there."""
        failed = self._try(what)
        gc.collect()
        if failed and self.row["asked"] == "largest" and what == "decode" and "RESOURCE_EXHAUSTED" in failed:
            self.row |= {"rows": in_eights(self.row["rows"] * 3 // 4), "attempts": 2}
            self.compiled.pop(what, None)
            failed = self._try(what)
        if failed:
            self.row[f"{what}_error"] = failed.splitlines()[0][:200]

    def _try(self, what: str) -> str | None:
        """Returns None, or the error, after which the arrays are free again."""
        try:
            if self.subject.params is None:
                self.subject.params = jax.block_until_ready(self.subject.make(jax.random.key(0)))
            if what not in self.compiled:
                self.compile(what)
            self.row |= self._decode() if what == "decode" else self._prefill()
        except (jax.errors.JaxRuntimeError, UserError) as error:
            return str(error)
        return None

    def start(self, params: Any) -> tuple[Any, jax.Array, dict[str, Any]]:
        """Returns what the loop takes: hidden vectors and state, random keys of the rows, numbers of the sampling."""
        rows, model = self.row["rows"], self.subject.model
        hidden = jnp.zeros((rows, self.subject.config.width), DTYPES[self.subject.config.dtype])
        state = model.bind(params).init_state(rows, self.length)
        return (hidden, state, None), jax.random.split(jax.random.key(0), rows), GREEDY.values(model.vocabulary)

    def _decode(self) -> dict[str, Any]:
        load, params, rows = timing.OtherLoad(), self.subject.params, self.row["rows"]
        carry, keys, values = jax.jit(self.start)(params)
        state = state_bytes(carry[1])
        left, seconds = np.full(rows, self.tokens, np.int32), []
        for piece in range(1 + self.pieces):
            begun = time.perf_counter()
            first, end = np.int32(piece * PIECE), np.int32(-1)
            carry, drawn, left = self.compiled["decode"](params, carry, keys, values, left, first, end)
            jax.block_until_ready(drawn)
            seconds.append((time.perf_counter() - begun) / PIECE)
        step = statistics.median(seconds[1:])
        result = {"state_bytes": state, "decode_tokens_per_second": rows / step, "step_seconds": step}
        result |= {"seconds": seconds, "others": load.cores()}
        chip = chip_of(jax.devices()[0].device_kind)
        if chip is not None:  # what the least traffic, weights and state read once, takes of the time
            result["bandwidth"] = (state + state_bytes(params)) / chip.bandwidth / step
        return result

    def _prefill(self) -> dict[str, Any]:
        model, shape = self.subject.model, (self.prefill_rows, self.length - self.tokens)
        prompts = np.random.default_rng(0).integers(0, model.vocabulary, shape)
        generation = Generation(model, self.subject.params, prompts, self.tokens, GREEDY)
        generation.programs = dataclasses.replace(generation.programs, prefill=self.compiled["prefill"])
        for _ in range(2):
            begun = time.perf_counter()
            jax.block_until_ready(generation.prefill())
            seconds = time.perf_counter() - begun
        return {"prefill_rows": self.prefill_rows, "prefill_tokens_per_second": prompts.size / seconds}

    def largest_batch(self) -> int:
        """Returns how many rows' states, and logits, fit beside the weights.

        Raises:
          UserError: none does, or the device does not give its memory.
        """
        # Logits and their exponentials, fp32, beside the state.
        row = state_bytes(self.subject.state(1, self.length)) + 3 * 4 * self.subject.model.vocabulary
        memory = jax.devices()[0].memory_stats() or {}
        if "bytes_limit" not in memory:
            raise UserError("--batches largest: this device does not give its memory; name numbers")
        free = memory["bytes_limit"] - memory["bytes_in_use"] - state_bytes(self.subject.shapes)
        rows = int(free * (1 - KEPT_FREE) / row)
        if rows < 1:
            raise UserError(f"the state of one row of {self.length} tokens does not fit the memory")
        return in_eights(rows)


def in_eights(rows: int) -> int:
    """Returns a number of rows in whole eights, which tensor cores take."""
    return max(rows // 8 * 8, min(rows, 7), 1)
