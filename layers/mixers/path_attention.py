"""PaTH attention: positions are products of Householder-like maps of the tokens between query and key.

    s_ij = q_i^T H_i ... H_{j+1} k_j / sqrt(k),   H_l = I - beta_l w_l w_l^T
    w = unit(silu(conv(x W_1 W_2))),   beta = 2 sigmoid(x W_b + b)                       per key head

Yang et al. 2025 (2505.16381), equations 3 to 5. With the unit lower triangular M = I + strictly_lower(diag(beta) W W^T)
the product is I - W^T M^-1 diag(beta) W over the tokens j + 1 to i, and parts of M^-1 are inverses of parts of M: one
triangular solve serves all pairs. What it takes away is added to the scores as their bias.

The cache keeps keys with all maps since applied (fp32), so that a new token costs a rank-one update of each.

Cost: whole sequences take t^2 (t + k) per head; the paper's kernel works in chunks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least
from recollect.layers.convolved import ConvolvedLinear
from recollect.layers.mixer import Context, MixerOutput, Place, zero_padding
from recollect.layers.mixers.attention import SoftmaxConfig
from recollect.layers.mixers.convolved_attention import ConvolvedAttention
from recollect.layers.modules.gates import unit
from recollect.layers.modules.linear import Linear, split_heads
from recollect.layers.modules.score_biases import distances
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class PathAttention(SoftmaxConfig):
    """PaTH attention. State: every key and value, and the last inputs of the convolution of w.

    Attributes:
      rank: of the map that w comes from.
      kernel: taps of its convolution.
    """

    heads: int = chz.field(default=2, validator=at_least(1))
    rank: int = chz.field(default=32, validator=at_least(1))
    kernel: int = chz.field(default=3, validator=has_taps)

    @chz.validate
    def _one_kind_of_positions(self) -> None:
        if self.positions is not None:
            raise UserError(f"positions={type(self.positions).__name__}: PathAttention has positions of its own")

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> PathMixer:
        return PathMixer(self, width, place, rngs)


class PathMixer(ConvolvedAttention):
    """The module of `PathAttention`."""

    def __init__(self, config: PathAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        channels = self.key_heads * self.head_dim
        self.down = Linear(width, config.rank, "d u", rngs)
        filters = CausalConvolution(channels, config.kernel, rngs)
        self.direction = ConvolvedLinear(Linear(config.rank, channels, "u gk", rngs), "direction", filters)
        self.strength = Linear(width, self.key_heads, "d g", rngs, bias=True)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> Any:
        """Returns a cache of one slot per token, keys in fp32, and the last inputs of the convolution."""
        cache, parts = super().init_state(batch_size, max_length, dtype)
        return dataclasses.replace(cache, keys=cache.keys.astype(jnp.float32)), parts

    def extend_cache(self, x: Float[Array, "b t d"], cache: Any, context: Context) -> tuple[MixerOutput, Any]:
        tokens, cursor = cache.cursor.read(context, *x.shape[:2])
        x = zero_padding(x, tokens)
        q, k, v = self._project(x, tokens.positions, tokens)
        _, values, slots, cache = cache.remember(k.astype(jnp.float32), v, tokens, cursor)
        fields: dict[str, Any] = {"query_positions": tokens.positions, "query_segments": tokens.segments}
        fields |= {"key_positions": slots.positions, "key_segments": slots.segments}
        bias, w, removed = self._removed(x, q, cache.keys, fields)
        seen = {"mask": self.config.mask(), "bias": bias, **fields}
        out = self._finish(softmax_attention(q, cache.keys.astype(q.dtype), values, **seen), x)
        keys = cache.keys - jnp.einsum("btgk,bgts->bsgk", w, removed)
        return out, dataclasses.replace(cache, keys=keys)

    def _bias(self, x: jax.Array, q: jax.Array, k: jax.Array, fields: dict[str, Any]) -> jax.Array:
        return self._removed(x, q, k, fields)[0]

    def _removed(self, x: jax.Array, q: jax.Array, k: jax.Array, fields: dict[str, Any]) -> tuple[jax.Array, ...]:
        """Returns what the maps take from scores (b, h, t, s), the directions w (b, t, g, k), and how much of each
        direction they take from each key (b, g, t, s); fp32."""
        (b, t, h, dim), (s, g) = q.shape, k.shape[1:3]
        w = unit(jax.nn.silu(split_heads(self.direction(self.down(x)).astype(jnp.float32), g)))
        beta = 2 * jax.nn.sigmoid(self.strength(x).astype(jnp.float32))
        applies = distances(q, k, fields) > 0
        if (of_queries := fields["query_segments"]) is not None:
            applies &= of_queries[:, :, None] == fields.get("key_segments", of_queries)[:, None]
            beta = jnp.where((of_queries != 0)[:, :, None], beta, 0)
        beta = jnp.moveaxis(beta, 1, 2)[..., None]  # (b, g, t, 1)
        overlap = jnp.tril(jnp.einsum("btgk,bsgk->bgts", w, w), -1)
        on_keys = jnp.where(applies[:, None], jnp.einsum("btgk,bsgk->bgts", w, k.astype(jnp.float32)), 0)
        matrix = jnp.eye(t) + beta * overlap
        removed = jax.scipy.linalg.solve_triangular(matrix, beta * on_keys, lower=True, unit_diagonal=True)
        on_queries = jnp.einsum("btgrk,bsgk->bgrts", q.reshape(b, t, g, h // g, dim).astype(jnp.float32), w)
        taken = jnp.einsum("bgrtl,bgls->bgrts", jnp.tril(on_queries), removed).reshape(b, h, t, s)
        return -taken * dim**-0.5, w, removed
