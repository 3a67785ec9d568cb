"""PaTH attention: positions are products of Householder-like maps of the tokens between query and key.

    s_ij = q_i^T H_i ... H_{j+1} k_j / sqrt(k),   H_l = I - beta_l w_l w_l^T
    w = unit(silu(conv(x W_1 W_2))),   beta = 2 sigmoid(x W_b + b)                       per key head

Yang et al. 2025 (2505.16381), equations 3 to 5. With the unit lower triangular M = I + strictly_lower(diag(beta) W W^T)
the product is I - W^T M^-1 diag(beta) W over the tokens j + 1 to i, and parts of M^-1 are inverses of parts of M: one
inverse serves all pairs of a block. As in the paper's section 3, blocks of queries come one after another, and between
them all keys are moved by the block's maps; what that changes is added to the scores as their bias.

The cache keeps keys with all maps since applied (fp32), so that a new token costs a rank-one update of each.

Cost: t^2 (4 k + 2 c) per head, in blocks of c tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

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
from recollect.layers.state.reads import cache_reads, report
from recollect.pallas_kernels.linear_recurrence.chunk_matrices import unit_inverse
from recollect.pallas_kernels.softmax_attention import softmax_attention

BLOCK = 16  # on two CPU cores, at 64 tokens: 64 is a quarter slower


@chz.chz(typecheck=True)
class PathAttention(SoftmaxConfig):
    """PaTH attention. State: every key and value, and the last inputs of the convolution of w.

    Attributes:
      rank: of the map that w comes from.
      kernel: taps of its convolution.
    """

    NOT_SERVED: ClassVar[dict[str, str]] = {
        "causal": "its positions are products of the maps of the tokens from a key up to its query",
        "cross": "no tokens stand between a key of the source and a query, whose maps would place it",
        "design": "its positions are products of the maps of the tokens from a key up to its query",
    }

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
        report(lambda: cache_reads(slots.segments))
        bias, keys = self._moved(x, q, cache.keys, fields)
        seen = {"bias": bias, **self._seen(fields), **fields}
        out = self._finish(softmax_attention(q, cache.keys.astype(q.dtype), values, **seen), x)
        return out, dataclasses.replace(cache, keys=keys)

    def _bias(self, x: jax.Array, q: jax.Array, k: jax.Array, fields: dict[str, Any]) -> jax.Array:
        return self._moved(x, q, k, fields)[0]

    def _moved(
        self, x: jax.Array, q: jax.Array, k: jax.Array, fields: dict[str, Any]
    ) -> tuple[Float[Array, "b h t s"], Float[Array, "b s g k"]]:
        """Returns what the maps add to the scores, and the keys with all of them applied; fp32."""
        (b, t, h, dim), (s, g) = q.shape, k.shape[1:3]
        w = unit(jax.nn.silu(split_heads(self.direction(self.down(x)).astype(jnp.float32), g)))
        beta = 2 * jax.nn.sigmoid(self.strength(x).astype(jnp.float32))
        applies = distances(q, k, fields) > 0
        if (of_queries := fields["query_segments"]) is not None:
            applies &= of_queries[:, :, None] == fields.get("key_segments", of_queries)[:, None]
            beta = jnp.where((of_queries != 0)[:, :, None], beta, 0)
        q, k = q.reshape(b, t, g, h // g, dim).astype(jnp.float32), k.astype(jnp.float32)

        def block(keys: jax.Array, rows: Any) -> tuple[jax.Array, jax.Array]:
            """Scores of the next queries beside those without maps, from and to keys with the maps applied so far."""
            q, w, beta, applies = rows
            beta = jnp.moveaxis(beta, 1, 2)[..., None]  # (b, g, c, 1)
            overlap = jnp.tril(jnp.einsum("bigk,bjgk->bgij", w, w), -1)
            on_keys = jnp.where(applies[:, None], jnp.einsum("bigk,bsgk->bgis", w, keys), 0)
            removed = jnp.einsum("bgij,bgjs->bgis", unit_inverse(beta * overlap), beta * on_keys)
            on_queries = jnp.tril(jnp.einsum("bigrk,bjgk->bgrij", q, w))
            before = jnp.einsum("bigrk,bsgk->bgris", q, keys - k)
            return keys - jnp.einsum("bigk,bgis->bsgk", w, removed), before - jnp.einsum(
                "bgrij,bgjs->bgris", on_queries, removed
            )

        rows = (q, w, beta, applies)
        if t <= BLOCK:
            keys, added = block(k, rows)
        else:
            whole = jax.tree.map(_in_blocks, rows)
            keys, added = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), k, whole)
            added = jnp.moveaxis(added, 0, 3).reshape(b, g, h // g, -1, s)[:, :, :, :t]
        return added.reshape(b, h, t, s) * dim**-0.5, keys


def _in_blocks(x: jax.Array) -> jax.Array:
    """(n, b, c, ...), with zeros after the last token: maps of strength 0."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]), 1, 0)
