"""Input-dependent sparse attention (Zoology): attention whose output counts at some tokens alone, those at which
there is something to recall.

    y_i = s_i Attn(u)_i + u_i
    select="repeats":  s_i = 1 where the token occurred earlier in its document, else 0
    select="learned":  s_i = sigmoid(w . u_i);   sparsity = weight relu(mean_i s_i - share)

Arora et al. 2024 (2312.04927), section 5, "programmatic" and "learned" selection; w has no bias. As BaseConv, the layer
adds its input itself, besides the block's residual. Published inference keeps the tokens of the largest s of the whole
sequence, which looks ahead: `threshold` keeps those above it, which does not.

Easy to get wrong: "repeats" needs the ids of tokens, which a model gives; where a mixer is called alone they are
unknown, and every token counts, as landmarks do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import UserError, requires
from recollect.layers.mixer import Context, MixerOutput, Place
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.linear import Linear
from recollect.layers.modules.selectors import complete_fields
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.layers.token_sums import TokenSums, Values, number_of_tokens, sum_over_tokens

UNKNOWN = -1

_is_share = requires(lambda value: 0 <= value <= 1, "must be from 0 to 1")


@chz.chz(typecheck=True)
class SelectiveAttention(SoftmaxConfig):
    """Attention at selected tokens. State: every key and value, and with "repeats" every token's id.

    Attributes:
      select: what selects.
      share: of tokens that "learned" may select without a loss; None: 1 / sqrt(tokens of the row).
      weight: of that loss.
      threshold: None weighs every output (training); a number leaves out tokens whose s is not above it. Set it on a
        trained model: parameters are the same.
    """

    select: Literal["repeats", "learned"] = "learned"
    share: float | None = chz.field(default=None, validator=_is_share)
    weight: float = chz.field(default=1e-3, validator=requires(lambda value: value >= 0, "must be 0 or more"))
    threshold: float | None = chz.field(default=None, validator=_is_share)

    @chz.validate
    def _repeats_of_the_stream(self) -> None:
        if self.cross and self.select == "repeats":
            raise UserError('cross=True with select="repeats": a repeat is of an earlier token of the same sequence')

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> SelectiveSoftmaxAttention:
        return SelectiveSoftmaxAttention(self, width, place, rngs)


class SelectiveSoftmaxAttention(SoftmaxAttention):
    """The module of `SelectiveAttention`."""

    config: SelectiveAttention

    def __init__(self, config: SelectiveAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.selector = Linear(width, 1, "d r", rngs) if config.select == "learned" else None

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """Returns a cache of one slot per token."""
        cache = super().init_state(batch_size, max_length, dtype)
        ids = None if self.selector is not None else jnp.full((batch_size, max_length), UNKNOWN, jnp.int32)
        return dataclasses.replace(cache, keys=(cache.keys, ids))

    def _project(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"] | None, context: Context) -> Any:
        """Returns queries and keys, each with the ids of tokens where these select, and values."""
        q, k, v = super()._project(x, positions, context)
        ids = None
        if self.selector is None:
            ids = jnp.full(x.shape[:2], UNKNOWN, jnp.int32) if context.token_ids is None else context.token_ids
        return (q, ids), (k, ids), v

    def _mix(self, x: jax.Array, q: Any, k: Any, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        (q, ids), (k, of_keys) = q, k
        out = super()._mix(x, q, k, v, fields)
        if self.selector is not None:
            selected = jax.nn.sigmoid(self.selector(x.astype(jnp.float32)))
        else:
            selected = _repeated(ids, of_keys, complete_fields(fields, *x.shape[:2]))[..., None].astype(jnp.float32)
        share, weight = self.config.share, self.config.weight if self.selector is not None else 0.0
        use = Selected(
            total=sum_over_tokens(selected, fields["query_segments"])[0],
            tokens=number_of_tokens(x, fields["query_segments"]),
            share=x.shape[1] ** -0.5 if share is None else share,
            weight=weight,
        )
        if self.config.threshold is not None:
            selected = jnp.where(selected > self.config.threshold, selected, 0)
        return MixerOutput((selected * out.hidden + x).astype(x.dtype), *use.formed(), use)


def _repeated(
    ids: Int[Array, "b t"], of_keys: Int[Array, "b s"], fields: dict[str, Int[Array, "b tokens"]]
) -> jax.Array:
    """Returns (b, t) which tokens have an id that is unknown or that an earlier one of their document has."""
    same = ids[:, :, None] == of_keys[:, None]
    same &= fields["key_positions"][:, None] < fields["query_positions"][..., None]
    same &= fields["key_segments"][:, None] == fields["query_segments"][..., None]
    return (ids == UNKNOWN) | jnp.any(same, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected(TokenSums):
    """The sum of s over tokens, and their number; share and weight of the loss."""

    total: Float[Array, ""]
    tokens: Float[Array, ""]
    share: float = dataclasses.field(metadata={"static": True})
    weight: float = dataclasses.field(metadata={"static": True})

    def formed(self) -> tuple[Values, Values]:
        mean = self.total / jnp.maximum(self.tokens, 1)
        losses = {"sparsity": self.weight * jax.nn.relu(mean - self.share)} if self.weight else {}
        return losses, {"selected_tokens": mean}
