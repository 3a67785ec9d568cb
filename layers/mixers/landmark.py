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

from typing import Any, ClassVar

import chz
import jax
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least, requires
from recollect.layers.mixer import MixerOutput, Place, Traits
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.positions import Rotary
from recollect.layers.modules.selection import hidden_bias, number_read, selected_reads
from recollect.layers.modules.selectors import LandmarkTokens, complete_fields
from recollect.layers.state.reads import Reads
from recollect.pallas_kernels.landmark_attention import landmark_attention, retrieve_blocks


@chz.chz(typecheck=True)
class Landmark(SoftmaxConfig):
    """Landmark attention. Rotary positions count landmarks.

    Attributes:
      block: ordinary tokens in a block; its landmark comes after them.
      retrieve: None reads all earlier blocks (training); k reads the k best for each query and head, with stingy
        positions, so that a model trained at one length reads one many times longer. Set it on a trained model:
        parameters are the same.
      predicted: the model predicts landmarks, as in the published fine-tuning of LLaMA: models/landmark_prediction.py.
      window: with `retrieve`, blocks that are read whole: those of the query's window of so many up to it; the k best
        come before it. The published code reads the whole chunk that a stream is at, of 5 to 7 blocks.
    """

    NOT_SERVED: ClassVar[dict[str, str]] = {
        "causal": "a landmark stands for the block before it, which later queries reach through it",
        "cross": "the source has no landmarks: models insert them into the stream alone",
        "design": "its grouped softmax has a mask of its own, of blocks and landmarks",
    }

    block: int = chz.field(default=8, validator=at_least(1))
    retrieve: int | None = chz.field(
        default=None, validator=requires(lambda value: value >= 1, "must be at least 1, or None to read all blocks")
    )

    predicted: bool = False
    window: int = chz.field(default=1, validator=at_least(1))

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
        block, retrieve, window = self.config.block, self.config.retrieve, self.config.window
        plain, fields = fields["query_positions"] is None, complete_fields(fields, *x.shape[:2])
        if retrieve is not None:
            selector = LandmarkTokens(block, retrieve, window, self.positions)
            schedule = selector.schedule(x, q, k, None, fields)
            o = retrieve_blocks(q, k, v, schedule, rotate=selector.rotate, window=window, **fields)
        else:
            if self.positions is not None:
                q, k = (self.positions.rotate(y, fields[f"{side}_positions"]) for y, side in ((q, "query"), (k, "key")))
            o = landmark_attention(q, k, v, block=block, **({} if plain else fields))
        return self._finish(o, x)

    def _reads(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, Any]) -> Reads:
        block, retrieve, window = self.config.block, self.config.retrieve, self.config.window
        if retrieve is None:
            return super()._reads(x, q, k, v, fields)
        selector = LandmarkTokens(block, retrieve, window, self.positions)
        blocks_of_query, j = (
            fields["query_positions"][:, None, :, None] // (block + 1),
            fields["key_positions"][:, None, None],
        )
        landmark, own = j % (block + 1) == block, j // (block + 1) == blocks_of_query
        read = selector.schedule(x, q, k, None, fields).mask(**fields)
        read |= j // (block + 1) // window == blocks_of_query // window
        # What retrieval weighs: the own block's tokens, and the landmarks of others, all of which are read to choose.
        weighed = landmark != own
        number = number_read((read | landmark) & ~(landmark & own), k.shape[2], fields)
        q, k = (selector.rotate(y, fields[f"{side}_positions"]) for y, side in ((q, "query"), (k, "key")))
        return selected_reads(number, read & weighed, q, k, fields, bias=hidden_bias(weighed))
