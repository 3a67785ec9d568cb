"""What tokens read while they are streamed: each mixer with keys reports it to whoever measures.

    with measured_reads() as layers:                      # around what is traced
        out, state = model.extend(tokens, state)
    sum(reads.keys for reads in layers)                   # keys read by each row, in all layers

Nothing is computed where nobody measures, and no state holds any of it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reads:
    """What the tokens of one call read in one layer, by row.

    Attributes:
      keys: how many, summed over the tokens: a mean over key heads. Those that are read to choose others count.
      mass: the share of the probability of full attention that chosen keys hold, a mean over tokens and query heads.
        None: nothing is chosen, or not all keys are there to compare.
    """

    keys: Float[Array, " b"]
    mass: Float[Array, " b"] | None = None


_layers: contextvars.ContextVar[list[Reads] | None] = contextvars.ContextVar("layers", default=None)


def measuring() -> bool:
    """Returns whether somebody measures."""
    return _layers.get() is not None


def report(reads: Callable[[], Reads]) -> None:
    """Adds what a layer read to what is measured; calls `reads` only then."""
    if (layers := _layers.get()) is not None:
        layers.append(reads())


@contextlib.contextmanager
def measured_reads() -> Iterator[list[Reads]]:
    """Gives a list to which each layer with keys adds what its tokens read, first layer first."""
    layers: list[Reads] = []
    token = _layers.set(layers)
    try:
        yield layers
    finally:
        _layers.reset(token)


def cache_reads(segments: Int[Array, "b s"]) -> Reads:
    """Returns what is read where that are all keys of a cache, by the segments of its slots."""
    return Reads(jnp.sum(segments != 0, axis=1, dtype=jnp.float32))


def mass_kept(
    of_read: Float[Array, "b t h"], of_all: Float[Array, "b t h"], segments: Int[Array, "b t"]
) -> Float[Array, " b"]:
    """Returns `Reads.mass` from the log-sum-exps of the scores of keys that are read, and of all: exp(read - all)."""
    valid = (segments != 0)[..., None] & (of_all > -jnp.inf)
    share = jnp.where(valid, jnp.exp(jnp.where(valid, of_read - of_all, 0)), 0)
    tokens = jnp.maximum(jnp.sum(segments != 0, axis=1), 1)
    return jnp.sum(jnp.mean(share, axis=2), axis=1) / tokens
