"""The decode cache of long convolutions: all past inputs.

    y_i = sum_{j <= i, same document} filter[i-j] x_j

A filter that is no sum of exponentials has no smaller exact state. Inputs are stored in order of arrival and padding
takes no slot, so the lag between two tokens of a document is the distance of their slots, and no position needs to be
stored. A few new tokens multiply the cache by filter taps directly, O(s d) each; many convolve the whole cache at once,
O(s d log^2 s).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.layers.state.capacity import BoundedState, check_capacity
from recollect.pallas_kernels.gated_convolution import long_convolution

DIRECT_UP_TO = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LongConvolutionCache(BoundedState):
    """Past inputs of a long convolution.

    Attributes:
      inputs: of each slot, in order of arrival.
      segments: of each slot; 0 marks a free one.
      count: valid tokens seen so far, of all documents together.
    """

    inputs: Float[Array, "b s f"]
    segments: Int[Array, "b s"]
    count: Int[Array, " b"]

    @classmethod
    def create(cls, batch_size: int, slots: int, channels: int, dtype: Any) -> LongConvolutionCache:
        """Returns an empty cache for streams of at most `slots` valid tokens."""
        return cls(
            inputs=jnp.zeros((batch_size, slots, channels), dtype),
            segments=jnp.zeros((batch_size, slots), jnp.int32),
            count=jnp.zeros(batch_size, jnp.int32),
        )

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.inputs.shape[1]

    def extend(
        self, x: Float[Array, "b t f"], filter: Float[Array, "s f"], segments: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t f"], LongConvolutionCache]:
        """Returns the outputs at new inputs x, and the cache with them.

        Args:
          filter: one tap per slot.
          segments: 0 is padding, which reads 0.

        Tokens without a free slot are refused; inside jit they read NaN and are counted (layers/state/capacity.py).
        """
        check_capacity(self, segments)
        valid = segments != 0
        x = jnp.where(valid[:, :, None], x, 0)
        slot = self.count[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        rows = jnp.arange(x.shape[0])[:, None]
        target = jnp.where(valid, slot, self.slots)
        after = LongConvolutionCache(
            inputs=self.inputs.at[rows, target].set(x.astype(self.inputs.dtype), mode="drop"),
            segments=self.segments.at[rows, target].set(segments.astype(jnp.int32), mode="drop"),
            count=self.count + jnp.sum(valid, axis=1, dtype=jnp.int32),
        )
        inside = jnp.clip(slot, 0, self.slots - 1)
        if x.shape[1] <= DIRECT_UP_TO:
            y = after._direct(filter, inside)
        else:
            y = long_convolution(after.inputs.astype(jnp.float32), filter, segment_ids=after.segments)[rows, inside]
        y = jnp.where((slot < self.slots)[:, :, None], y, jnp.nan)
        return jnp.where(valid[:, :, None], y, 0).astype(x.dtype), after

    def _direct(self, filter: Float[Array, "s f"], slot: Int[Array, "b t"]) -> Float[Array, "b t f"]:
        """Returns the outputs at `slot` in fp32, one token after another so that memory stays O(b s f)."""
        # Entry s - 1 - i + j holds the tap of slot j for a query in slot i; it is 0 for later slots.
        reversed_taps = jnp.concatenate([filter[::-1], jnp.zeros_like(filter)])

        def read(inputs: jax.Array, segments: jax.Array, query: jax.Array) -> jax.Array:
            taps = jax.lax.dynamic_slice_in_dim(reversed_taps, self.slots - 1 - query, self.slots)
            return jnp.sum(taps * inputs.astype(jnp.float32), axis=0, where=(segments == segments[query])[:, None])

        def step(_, query: jax.Array):
            return None, jax.vmap(read)(self.inputs, self.segments, query)

        return jnp.moveaxis(jax.lax.scan(step, None, slot.T)[1], 0, 1)
