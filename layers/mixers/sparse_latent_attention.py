"""DeepSeek sparse attention (DSA): latent attention whose queries read the tokens that a lightning indexer picks.

    o_t = sum over s in S_t of softmax_s(q_t . k_s / sqrt(k + r)) v_s,   S_t = the top tokens s <= t by I_ts

DeepSeek-V3.2 (2512.02556), section 2.1, equations 1 and 2, on latent_attention.py; the indexer, its scores I and the
loss that trains it: layers/modules/lightning_indexer.py. All heads read the same tokens. On every backend all scores
are computed and those of tokens not picked hidden: it saves no time here; the state keeps every token.

Published training: with `retrieve.dense=True` and everything but the indexer frozen first, then sparse.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.layers.mixer import Context, MixerOutput, Place
from recollect.layers.mixers.latent_attention import LatentAttention, MultiHeadLatentAttention
from recollect.layers.modules.lightning_indexer import LightningIndexer
from recollect.layers.modules.selection import (
    hidden_bias,
    keys_read,
    selector_losses,
    selector_reads,
    token_indices,
    with_kept,
)
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.layers.state.reads import Reads


@chz.chz(typecheck=True)
class SparseLatentAttention(LatentAttention):
    """Latent attention to picked tokens (DSA). State: that of `LatentAttention`, and an index key per token.

    Attributes:
      retrieve: the indexer.
    """

    NOT_SERVED: ClassVar[dict[str, str]] = {
        "causal": "its indexer picks among the tokens before a query",
        "cross": "its indexer scores the tokens of one sequence",
        "design": "its indexer picks among the tokens before a query",
    }

    retrieve: LightningIndexer = LightningIndexer()

    def module(self, width: int, place: Place, rngs: nnx.Rngs) -> SparseMultiHeadLatentAttention:
        return SparseMultiHeadLatentAttention(self, width, place, rngs)


class SparseMultiHeadLatentAttention(MultiHeadLatentAttention):
    """The module of `SparseLatentAttention`."""

    def __init__(self, config: SparseLatentAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.selector = config.retrieve.build(width, config.heads, self.key_dim + config.rotary_dim, rngs)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """Returns a cache of one slot per token."""
        return with_kept(super().init_state(batch_size, max_length, dtype), self.selector, self.down.kernel.shape[0])

    def _project(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"] | None, context: Context) -> Any:
        """Returns queries, latents with index keys, and the shared part of the keys."""
        q, latent, shared = super()._project(x, positions, context)
        return q, (latent, self.selector.keep(x, token_indices(x, positions))), shared

    def _mix(self, x: jax.Array, q: jax.Array, k: Any, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        latent, kept = k
        read = keys_read(self.selector, x, q, latent, kept, fields)
        out = super()._mix(x, q, latent, v, fields | {"bias": hidden_bias(read)})
        losses = {}
        if "key_positions" not in fields:
            keys = self._keys(latent, v)
            losses = selector_losses(self.selector, x, q, keys, kept, fields, read, self.scale)
        return dataclasses.replace(out, losses=losses)

    def _reads(self, x: jax.Array, q: jax.Array, k: Any, v: jax.Array, fields: dict[str, Any]) -> Reads:
        latent, kept = k
        read = keys_read(self.selector, x, q, latent, kept, fields)
        return selector_reads(self.selector, read, *self._absorbed(q, latent, v), fields, scale=self.scale)
