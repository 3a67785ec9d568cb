"""The forgetting transformer's attention (FoX): every token lets what came before it fade, per head.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(k) + F_ij) v_j
    F_ij = sum_{j < l <= i} log f_l,   f_l = sigmoid(x_l W_f + b)

Lin et al. 2025 (2503.02130), equation 5; no positions are needed beside it. Biases start at 0, so that f is near 1/2.

The cache keeps log f of each token, in fp32 and in order of arrival; its sums run from the newest token back, so that
those of near keys, which count, are exact however long the stream is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import at_least
from recollect.layers.mixer import Context, MixerOutput, Place
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.linear import Linear
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class ForgettingAttention(SoftmaxConfig):
    """Softmax attention with forget gates. State: every key and value, and a gate per token and head."""

    NOT_SERVED: ClassVar[dict[str, str]] = {
        "causal": "a key is forgotten by the gates of the tokens from it up to its query, and a later key has none",
        "cross": "no tokens stand between a key of the source and a query, whose gates would forget it",
        "design": "a key is forgotten by the gates of the tokens from it up to its query, so it must not come after it",
    }

    heads: int = chz.field(default=2, validator=at_least(1))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> ForgettingSoftmaxAttention:
        return ForgettingSoftmaxAttention(self, width, place, rngs)


class ForgettingSoftmaxAttention(SoftmaxAttention):
    """The module of `ForgettingAttention`."""

    def __init__(self, config: ForgettingAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.forget = Linear(width, config.heads, "d h", rngs, bias=True)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """Returns a cache of one slot per token."""
        cache = super().init_state(batch_size, max_length, dtype)
        gates = jnp.zeros((batch_size, max_length, self.config.heads), jnp.float32)
        return dataclasses.replace(cache, keys=(cache.keys, gates))

    def _project(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"] | None, context: Context) -> Any:
        """Returns queries and keys, each with log f, and values."""
        q, k, v = super()._project(x, positions, context)
        gates = jax.nn.log_sigmoid(self.forget(x).astype(jnp.float32))
        if context.segments is not None:
            gates = jnp.where((context.segments != 0)[:, :, None], gates, 0)
        return (q, gates), (k, gates), v

    def _mix(self, x: jax.Array, q: Any, k: Any, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        (q, of_queries), (k, of_keys) = q, k
        sums = later_sums if "key_positions" in fields else earlier_sums
        bias = sums(of_keys)[:, :, None, :] - sums(of_queries)[:, :, :, None]
        positions = self._bias(x, q, k, fields)
        bias = bias if positions is None else bias + positions
        return self._finish(softmax_attention(q, k, v, bias=bias, **self._seen(fields), **fields), x)


def later_sums(gates: Float[Array, "b s h"]) -> Float[Array, "b h s"]:
    """Returns the sum of log f over all tokens after each one, those of a cache."""
    return jnp.swapaxes(jnp.cumsum(gates[:, ::-1], axis=1)[:, ::-1] - gates, 1, 2)


def earlier_sums(gates: Float[Array, "b t h"]) -> Float[Array, "b h t"]:
    """Returns minus the sum of log f up to each token, which later tokens do not change, not even in its last bits."""
    return -jnp.swapaxes(jnp.cumsum(gates, axis=1), 1, 2)
