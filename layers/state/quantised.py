"""A cache of quantised keys and values: keys in steps of their own per channel, values per token, the newest tokens as
they are.

    code = round((x - low) / step),   step = (high - low) / (2^bits - 1)

Liu et al. 2024 (KIVI, 2402.02750), section 3.2: channels of keys have outliers that stay where they are from token to
token, values have none, so keys share low and step over a block of tokens and values over the channels of a token.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from recollect.configuration import at_least
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes, NewTokens, View
from recollect.layers.state.eviction import Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """Quantised vectors: of 4 bits, two neighbouring channels share a byte."""

    code: UInt8[Array, "b g n w p"]
    low: Float[Array, "b g n #w #c"]
    step: Float[Array, "b g n #w #c"]

    @classmethod
    def of(cls, x: Float[Array, "b g n w c"], bits: int, axis: int) -> Codes:
        """Quantises blocks of `w` tokens; low and step are common to all along `axis`."""
        low, high = jnp.min(x, axis=axis, keepdims=True), jnp.max(x, axis=axis, keepdims=True)
        step = jnp.where(high > low, (high - low) / (2**bits - 1), 1)
        code = jnp.round((x - low) / step).astype(jnp.uint8)
        if bits == 4:
            code = jnp.pad(code, [(0, 0)] * 4 + [(0, x.shape[-1] % 2)])
            code = code[..., 0::2] | (code[..., 1::2] << 4)
        return cls(code, low, step)

    def vectors(self, bits: int, channels: int) -> Float[Array, "b g s c"]:
        """Returns the vectors, blocks joined."""
        code = self.code
        if bits == 4:
            code = jnp.stack([code & 15, code >> 4], axis=-1).reshape(*code.shape[:-1], -1)[..., :channels]
        x = code.astype(self.step.dtype) * self.step + self.low
        return x.reshape(*x.shape[:2], -1, channels)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedSlots:
    """Complete blocks, in codes, and the tokens since, as they are.

    Attributes:
      positions, segments: of the tokens in blocks.
    """

    keys: Codes
    values: Codes
    positions: Int[Array, "b 1 n w"]
    segments: Int[Array, "b 1 n w"]
    newest: Slots


@chz.chz(typecheck=True)
class Quantised(CachePolicy):
    """Every token, those before the newest 1 to `window` in few bits (KIVI).

    Attributes:
      bits: of each element.
      window: tokens of a block, which are quantised together once the next one comes.
    """

    bits: Literal[4, 8] = 8
    window: int = chz.field(default=32, validator=at_least(1))

    def init(self, sizes: CacheSizes) -> QuantisedSlots:
        blocks = (sizes.max_length - 1) // self.window

        def codes(channels: int, axis: int) -> Codes:
            room = jnp.zeros((sizes.batch_size, sizes.heads, blocks, self.window, channels), sizes.dtype)
            return Codes.of(room, self.bits, axis)

        # Two arrays: generation donates a state, and none twice.
        positions, segments = (jnp.zeros((sizes.batch_size, 1, blocks, self.window), jnp.int32) for _ in range(2))
        newest = Slots.create(sizes, min(self.window, sizes.max_length))
        return QuantisedSlots(codes(sizes.key_dim, 3), codes(sizes.value_dim, 4), positions, segments, newest)

    def append(self, cache: QuantisedSlots, new: NewTokens) -> QuantisedSlots:
        newest, block, place = cache.newest, new.number[:, 0] // self.window, new.number % self.window
        full = new.valid[:, 0] & (place[:, 0] == 0) & (block > 0)
        if cache.positions.shape[2]:
            cache = self._with_block(cache, jnp.where(full, block - 1, cache.positions.shape[2]))
        kept = jnp.where(full[:, None, None], 0, newest.segments)
        newest = dataclasses.replace(newest, segments=kept)
        slot = jnp.where(new.valid, place, newest.keys.shape[2])
        return dataclasses.replace(cache, newest=newest.put(slot[:, None], new))

    def _with_block(self, cache: QuantisedSlots, block: Int[Array, " b"]) -> QuantisedSlots:
        """Returns the cache with the newest tokens in codes at `block`; nowhere past the last one."""
        newest, rows = cache.newest, jnp.arange(len(block))
        keys, values = (
            Codes.of(newest.keys[:, :, None], self.bits, 3),
            Codes.of(newest.values[:, :, None], self.bits, 4),
        )

        def write(old: jax.Array, value: jax.Array) -> jax.Array:
            return old.at[rows, :, block].set(value[:, :, 0].astype(old.dtype), mode="drop", unique_indices=True)

        return QuantisedSlots(
            jax.tree.map(write, cache.keys, keys),
            jax.tree.map(write, cache.values, values),
            write(cache.positions, newest.positions[:, :, None]),
            write(cache.segments, newest.segments[:, :, None]),
            newest,
        )

    def select(self, cache: QuantisedSlots, q: Float[Array, "b g r k"], new: NewTokens) -> tuple[View, ...]:
        return self.past(cache, new)

    def past(self, cache: QuantisedSlots, new: NewTokens) -> tuple[View, ...]:
        newest = cache.newest.view()
        if not cache.positions.shape[2]:
            return (newest,)
        keys, values = (
            codes.vectors(self.bits, exact.shape[-1])
            for codes, exact in ((cache.keys, newest.keys), (cache.values, newest.values))
        )
        positions, segments = (x.reshape(*x.shape[:2], -1) for x in (cache.positions, cache.segments))
        return (View(keys, values, positions, segments), newest)
