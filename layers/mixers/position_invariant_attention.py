"""Softmax attention that does not depend on the order of segments whose order means nothing (PINE).

The grids of the field "grid" (from 1) are such segments: documents that were retrieved, candidates, images. A reader, a
segment or a token behind them, ranks them by their importance to it, and lays them out so that the most important one
is the nearest:

    w_n = 1/|n| sum_{j in n} softmax_j(q . k_j / sqrt(k))         importance of segment n to a token of another one
    p_j = e - |n| + (place of j in n) - sum_{m: w_m > w_n} |m|    position of its token j, per head and reader

e is the first position behind all segments, and q and k have no positions in w; the w of a segment that reads are
summed over its tokens, and it ranks itself first. So a segment sees itself causally and all of the others, and tokens
behind see everything, with rotary positions that differ by head and reader. Moving a segment back by some positions
turns its keys as moving the query forward by them does, which is how they are computed here: one rotated query per
segment, in (b, h, n, t, k).

Wang et al., Eliminating Position Bias of Language Models (arXiv 2407.01100), section 3; wzq016/PINE. Quadratic in
memory: a reference to compare with; `PlannedAttention(plan="parallel")` is invariant, too, and runs on kernels. How
segments are ranked and laid out is in layers/modules/segment_layout.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recollect.configuration import UserError, at_least
from recollect.layers.mixer import Context, MixerOutput, Place, Traits, zero_padding
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules import position_plans
from recollect.layers.modules.positions import PositionsConfig, Rotary
from recollect.layers.modules.segment_layout import importance, moves, stacked
from recollect.layers.packing import token_positions
from recollect.pallas_kernels.masks import Causal, KeyIs, Mask, QueryIs, Same, SameSegment
from recollect.pallas_kernels.scheduled_attention.block_schedule import pairs_allowed
from recollect.pallas_kernels.softmax_attention.xla import unnormalised_softmax


@chz.chz(typecheck=True)
class PositionInvariantAttention(SoftmaxConfig):
    """Attention to segments in any order.

    Attributes:
      segments: the most segments that a row may have.
    """

    segments: int = chz.field(default=4, validator=at_least(1))
    positions: PositionsConfig | None = Rotary()

    @chz.validate
    def _rotates(self) -> None:
        if not isinstance(self.positions, Rotary):
            raise UserError("positions: segments are laid out by rotary positions; set positions=Rotary")
        if self.dropout:
            raise UserError(f"dropout={self.dropout}: PositionInvariantAttention has none")

    NOT_SERVED: ClassVar[Mapping[str, str]] = {
        "causal": "segments see one another as it is; text sees what is before it",
        "cross": "segments are parts of one sequence",
        "design": "its positions need segments that see one another",
    }

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, streams=False)

    def mask(self) -> Mask:
        outside = QueryIs("grid", (0,)) | KeyIs("grid", (0,))
        return SameSegment() & (Causal() | ~(outside | Same("grid")))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> PositionInvariantAttentionMixer:
        return PositionInvariantAttentionMixer(self, width, place, rngs)


class PositionInvariantAttentionMixer(SoftmaxAttention):
    """The module of `PositionInvariantAttention`."""

    config: PositionInvariantAttention
    caches_rotated_keys = False

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        x = zero_padding(x, context)
        fields = position_plans.fields_of(context, *x.shape[:2])
        fields["positions"] = token_positions(context, *x.shape[:2])
        q, k, v = self._project(x, fields["positions"], context)
        k, v = (jnp.repeat(heads, q.shape[2] // heads.shape[2], axis=2) for heads in (k, v))
        mask = self.config.mask()
        read = {name: fields[name] for name in mask.fields}
        same = pairs_allowed(SameSegment(), {"segments": fields["segments"]}, {"segments": fields["segments"]})
        members = fields["grid"][:, :, None] == 1 + jnp.arange(self.config.segments)
        members &= (fields["segments"] != 0)[:, :, None]
        moved = moves(importance(q, k, members, same), members)
        scores = self._scores(q, k, fields["positions"], members, moved) * q.shape[-1] ** -0.5
        allowed = pairs_allowed(mask, read, read)[:, None]
        weights, total, _ = unnormalised_softmax(jnp.where(allowed, scores, -jnp.inf))
        out = jnp.einsum("bhts,bshv->bthv", (weights / total[..., None]).astype(v.dtype), v)
        return self._finish(out, x)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> Any:
        raise UserError("PositionInvariantAttention cannot stream or generate: it lays out whole sequences")

    def _scores(
        self,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b s h k"],
        positions: Int[Array, "b t"],
        members: Bool[Array, "b t n"],
        moved: Int[Array, "b h t n"],
    ) -> Float[Array, "b h t s"]:
        """Returns the scores of all pairs, fp32, with positions of keys per head and reader."""
        rotary = self.positions
        assert isinstance(rotary, Rotary)
        placed = stacked(positions, members)
        outside = ~jnp.any(members, axis=2, keepdims=True)
        parts = jnp.concatenate([members, outside], axis=2)  # the last one: tokens that are in no segment
        at = placed[:, None, :, None] + jnp.pad(moved, ((0, 0), (0, 0), (0, 0), (0, 1)))  # (b, h, t, n + 1)
        at = jnp.moveaxis(at, 3, 2)
        queries = jnp.broadcast_to(jnp.moveaxis(q, 2, 1)[:, :, None], (*at.shape, q.shape[-1]))
        queries = rotary.rotate(queries[..., None, :], at)[..., 0, :]
        keys = rotary.rotate(k, placed)[:, :, None] * parts[..., None, None].astype(k.dtype)
        return jnp.einsum("bhntk,bsnhk->bhts", queries, keys, preferred_element_type=jnp.float32)
