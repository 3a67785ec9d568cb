"""DeepSeek's lightning indexer: the tokens that each query reads, by scores of its own that cost little."""

from __future__ import annotations

from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recollect.configuration import at_least, requires
from recollect.layers.modules.linear import Linear, split_heads
from recollect.layers.modules.norms import LayerNormalization
from recollect.layers.modules.positions import Rotary
from recollect.layers.modules.selectors import Fields, Selector, SelectorModule
from recollect.pallas_kernels.key_schedule import KeyBlocks, KeySchedule, best_blocks, complete_blocks, earlier_blocks


@chz.chz(typecheck=True)
class LightningIndexer(Selector):
    """The `top` tokens of the largest index score, for all heads of a query alike (DeepSeek-V3.2, 2512.02556, equations
    1 to 4):

        I_ts = sum_j w_tj relu(q_tj . k_s),   q_t = x_t W_q,  k_s = LayerNorm(x_s W_k),  w_t = x_t W_w / sqrt(heads dim)

    It is trained by a loss of its own alone, since its input passes no gradient: KL(p_t || softmax(I_t)) over the
    tokens read, with p_t the mixer's weights averaged over heads.

    Attributes:
      heads, dim: of the index queries; there is one index key per token.
      top: tokens that a query reads.
      dense: read every token, and train the indexer on all of them (the published warm-up, with the rest frozen).
      positions: Rotary, on index queries and keys.
      weight: coefficient of the loss.
    """

    heads: int = chz.field(default=4, validator=at_least(1))
    dim: int = chz.field(default=16, validator=at_least(1))
    top: int = chz.field(default=16, validator=at_least(1))
    dense: bool = False
    positions: Rotary | None = None
    weight: float = chz.field(default=1.0, validator=requires(lambda value: value >= 0, "must be 0 or more"))

    def build(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> Indexer:
        """Returns the module."""
        return Indexer(self, width, rngs)


class Indexer(nnx.Module, SelectorModule):
    """The module of `LightningIndexer`."""

    def __init__(self, config: LightningIndexer, width: int, rngs: nnx.Rngs):
        self.config = config
        self.query = Linear(width, config.heads * config.dim, "d hk", rngs)
        self.key = Linear(width, config.dim, "d k", rngs)
        self.norm = LayerNormalization(config.dim)
        self.head_weights = Linear(width, config.heads, "d h", rngs)
        self.positions = None if config.positions is None else config.positions.build_in(width, 1, config.dim, rngs)

    def keep(self, x: Float[Array, "b t d"], positions: Int[Array, "#b t"]) -> Float[Array, "b t k"]:
        """Returns the index keys."""
        k = self.norm(self.key(jax.lax.stop_gradient(x)))
        return k if self.positions is None else self.positions.rotate(k[:, :, None], positions)[:, :, 0]

    def scores(self, x: Float[Array, "b t d"], kept: Any, positions: Int[Array, "b t"]) -> Float[Array, "b t s"]:
        """Returns the index scores I, fp32."""
        x = jax.lax.stop_gradient(x)
        q = split_heads(self.query(x), self.config.heads)
        q = q if self.positions is None else self.positions.rotate(q, positions)
        weights = self.head_weights(x).astype(jnp.float32) * (self.config.heads * self.config.dim) ** -0.5
        products = jnp.einsum("bthk,bsk->bths", q, kept, preferred_element_type=jnp.float32)
        return jnp.einsum("bths,bth->bts", jax.nn.relu(products), weights)

    def candidates(self, fields: Fields) -> tuple[KeyBlocks, Bool[Array, "b t n"]]:
        """Returns the tokens, as blocks of one, and which each query may read."""
        tokens = complete_blocks(fields["key_positions"], fields["key_segments"], 1)
        return tokens, earlier_blocks(tokens, fields["query_positions"] + 1, fields["query_segments"])

    def schedule(self, x, q, k, kept: Any, fields: Fields) -> KeySchedule:
        """Returns the tokens, as blocks of one."""
        tokens, allowed = self.candidates(fields)
        top = kept.shape[1] if self.config.dense else self.config.top
        scores = self.scores(x, kept, fields["query_positions"])
        return KeySchedule(tokens, *best_blocks(scores[:, :, None], allowed[:, :, None], top), 1, own=False)

    def loss(self, x, kept: Any, weights, read, fields: Fields) -> Float[Array, ""]:
        """Returns the mean over tokens of KL(weights || softmax(I)) over the keys read, times its coefficient."""
        real = fields["query_segments"] != 0
        scores = jnp.where(read, self.scores(x, kept, fields["query_positions"]), -1e30)
        logs = jnp.where(read, jax.nn.log_softmax(scores, axis=-1), 0)
        entropy = jax.scipy.special.xlogy(weights, weights)
        divergence = jnp.sum(jnp.where(real[:, :, None], entropy - weights * logs, 0), axis=-1)
        return self.config.weight * jnp.sum(divergence) / jnp.maximum(jnp.sum(real), 1)
