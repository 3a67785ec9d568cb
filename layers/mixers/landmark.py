"""Landmark attention (Mohtashami & Jaggi 2023): the attention to a block's landmark token gates the attention into that
block.

    main_i = softmax over {own block, up to i} and {landmarks of earlier blocks};  w_ij = main_i(landmark of b)
    softmax_b(s_ij)

(the full definition is in recollect.pallas_kernels.landmark_attention). The model inserts the landmarks, one after
every `block` ordinary tokens of a document: see models/landmarks.py. They pass through every layer as tokens.

Training and prompts run on kernels where there are any. One token against the cache reads all keys in place, or, with
`retrieve`, landmarks, the retrieved blocks and its own block.

Easy to get wrong: a query never sees its own block's landmark (not even the landmark itself); a landmark's value is
never read; keys are stored unrotated, since with retrieval a block's position depends on the query.
"""

from __future__ import annotations

from typing import Any

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least, requires
from recollect.layers.mixer import MixerOutput, Place, Traits
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.positions import Rotary
from recollect.pallas_kernels.landmark_attention import landmark_attention, retrieve_blocks


@chz.chz(typecheck=True)
class Landmark(SoftmaxConfig):
    """Landmark attention. Rotary positions count landmarks.

    Attributes:
      block: ordinary tokens in a block; its landmark comes after them.
      retrieve: None reads all earlier blocks (training); k reads the k best for each query and head, with stingy
        positions, so that a model trained at one length reads one many times longer. Set it on a trained model:
        parameters are the same.
    """

    block: int = chz.field(default=8, validator=at_least(1))
    retrieve: int | None = chz.field(
        default=None, validator=requires(lambda value: value >= 1, "must be at least 1, or None to read all blocks")
    )

    @chz.validate
    def _no_dropout(self) -> None:
        if self.dropout:
            raise UserError(f"dropout={self.dropout}: Landmark's grouped softmax drops no weights; it must be 0")

    @chz.validate
    def _movable_positions(self) -> None:
        if not isinstance(self.positions, Rotary | None):
            raise UserError(
                f"Landmark takes Rotary positions or none: {type(self.positions).__name__} cannot be moved to where a "
                "block is retrieved"
            )

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> LandmarkMixer:
        return LandmarkMixer(self, width, place, rngs)

    @property
    def traits(self) -> Traits:
        return Traits(landmark_block=self.block)


class LandmarkMixer(SoftmaxAttention):
    """The module of `Landmark`; its cache keeps all tokens, landmarks included, and keys unrotated."""

    caches_rotated_keys = False
    config: Landmark

    def _mix(
        self,
        x: Float[Array, "b t d"],
        q: Float[Array, "b t h k"],
        k: Float[Array, "b s g k"],
        v: Float[Array, "b s g v"],
        fields: dict[str, Any],
    ) -> MixerOutput:
        block, retrieve = self.config.block, self.config.retrieve
        rotate = (lambda x, positions: x) if self.positions is None else self.positions.rotate
        positions, segments = fields["query_positions"], fields["query_segments"]
        plain = positions is None
        if plain:  # one document from its start
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        if "key_positions" not in fields:
            segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
            fields = {
                "query_positions": positions,
                "query_segments": segments,
                "key_positions": positions,
                "key_segments": segments,
            }
        if retrieve is not None:
            o = retrieve_blocks(q, k, v, block=block, top=retrieve, rotate=rotate, **fields)
        else:
            q, k = rotate(q, fields["query_positions"]), rotate(k, fields["key_positions"])
            o = landmark_attention(q, k, v, block=block, **({} if plain else fields))
        return self._finish(o, x)
