"""What the laws of mixers take and use: the mixer, inputs, comparisons to a tolerance, the error of a broken law."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError
from recollect.layers.context import Context, Source
from recollect.layers.mixer import Mixer, MixerConfig, Place, State

WIDTH, LENGTH = 16, 63
# Tolerances on rms(error)/rms(reference). fp32 sums in another order differ by a few 1e-7 times the root of their
# length.
FP32 = 2e-5
# Products of bf16 inputs carry 2^-9 each; a mixer chains three to five of them.
BF16 = 0.03

DOCUMENTS = np.array([[1] * 5 + [2] * 31 + [3] + [4] * 12 + [0] * 14, [7] * 44 + [9] * 19])
"""Two rows of 63 tokens: several documents, padding at the end; segment numbers need not count up by one."""

SOURCE_DOCUMENTS = np.array([[1] * 3 + [2] * 7 + [3] * 2 + [4] + [0] * 5, [7] * 8 + [0] * 2 + [9] * 8])
"""The documents of the source that cross mixers read beside them."""


class LawBroken(AssertionError):
    """A law does not hold for a mixer."""


class Subject:
    """A mixer that the laws are asked of, with weights large enough that every path matters. Programs are compiled
    once for each shape."""

    def __init__(self, config: MixerConfig, name: str = ""):
        self.config, self.traits = config, config.traits
        self.name = name or type(config).__name__
        graph, state = nnx.split(config.build(WIDTH, Place(1, 4), nnx.Rngs(params=jax.random.key(3))))
        self.graph = graph
        self.weights = jax.tree.map(
            lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state
        )

    @property
    def module(self) -> Mixer:
        """The mixer itself."""
        return nnx.merge(self.graph, self.weights)

    def call(self, x: Float[Array, "b t d"], context: Context = Context()) -> Float[Array, "b t d"]:
        """Returns the outputs for whole sequences."""
        return self._call(self.weights, x, self.with_source(context, x.shape[0]))

    def with_source(self, context: Context, b: int) -> Context:
        """Returns the context of `b` rows with the source that a cross mixer reads, unless it has one: packed where the
        context is."""
        if not self.traits.cross or context.source is not None:
            return context
        segments = None if context.segments is None else jnp.asarray(SOURCE_DOCUMENTS)
        source = Source(inputs(SOURCE_DOCUMENTS.shape[1], b, seed=8), Context(segments=segments))
        return dataclasses.replace(context, source=source)

    def init_state(self, batch_size: int, max_length: int, context: Context = Context()) -> State:
        """Returns the state before any token; of a cross mixer beside the source of `with_source`."""
        source = self.with_source(context, batch_size).source
        module = self.module
        return module.init_state(batch_size, max_length) if source is None else module.init_cross_state(source)

    @functools.cached_property
    def _call(self) -> Callable[..., Any]:
        return jax.jit(lambda weights, x, context: nnx.merge(self.graph, weights)(x, context).hidden)

    def extend(
        self, x: Float[Array, "b t d"], state: State, context: Context = Context()
    ) -> tuple[Float[Array, "b t d"], State]:
        """Returns the outputs for the next tokens, and the state after them."""
        return self._extend(self.weights, x, state, context)

    @functools.cached_property
    def _extend(self) -> Callable[..., Any]:
        def run(weights: Any, x: jax.Array, state: State, context: Context) -> tuple[jax.Array, State]:
            out, state = nnx.merge(self.graph, weights).extend(x, state, context)
            return out.hidden, state

        return jax.jit(run)


def inputs(t: int, b: int = 2, seed: int = 0, dtype: Any = jnp.float32) -> Float[Array, "b t d"]:
    """Returns random inputs of `WIDTH` channels."""
    return jax.random.normal(jax.random.key(seed), (b, t, WIDTH), dtype)


def error(actual: Any, expected: Any) -> float:
    """Returns rms(actual - expected) / rms(expected)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-12))


def require(holds: Any, what: str) -> None:
    """Raises LawBroken unless `holds`."""
    if not holds:
        raise LawBroken(what)


def require_close(actual: Any, expected: Any, tolerance: float, what: str) -> None:
    """Raises LawBroken, with the first row and token that differ, unless two (rows, tokens, width) arrays agree to an
    rms error of `tolerance` of the expected rms."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    require(actual.shape == expected.shape, f"{what}: shape {actual.shape} instead of {expected.shape}")
    if (ratio := error(actual, expected)) < tolerance:
        return
    by_token = np.sqrt(np.mean((actual - expected) ** 2, axis=-1))
    row, token = np.argwhere(~(by_token < tolerance * np.sqrt(np.mean(expected**2))))[0]
    channel = int(np.argmax(np.nan_to_num(abs(actual - expected)[row, token], nan=np.inf)))
    values = f"{actual[row, token, channel]:.5g} instead of {expected[row, token, channel]:.5g}"
    first = f"first at row {row}, token {token}, channel {channel}: {values}"
    raise LawBroken(f"{what}: {first} (relative rms error {ratio:.1e}, allowed {tolerance:.0e})")


def require_refusal(function: Callable[[], Any], pattern: str) -> None:
    """Raises LawBroken unless a function raises a UserError whose message has `pattern`."""
    try:
        function()
    except UserError as refusal:
        require(re.search(pattern, str(refusal)), f"refuses with {str(refusal)!r}, which should say {pattern!r}")
    else:
        raise LawBroken(f"should raise UserError with {pattern!r}, and raises nothing")
