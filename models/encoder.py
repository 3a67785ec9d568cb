"""Encoders: what reads the source of an encoder-decoder. `LanguageModel.encoder` makes a model one.

The source's tokens are embedded as the stream's are, pass through blocks of their own, and cross mixers of the decoder
read the result (Vaswani et al. 2017, section 3.1). An encoder alone needs none of this: it is a `LanguageModel` whose
mixers have `causal=False`, with its head at masked tokens or a `Classifier`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import Config, UserError, requires
from recollect.layers.context import Context, Source
from recollect.layers.modules.mlp import MlpConfig
from recollect.layers.modules.positions import LearnedPositions
from recollect.layers.packing import document_positions, token_positions
from recollect.models.stack import Stack, Stage

if TYPE_CHECKING:
    from recollect.models.language_model import LanguageModel, LanguageModelModule


@chz.chz(typecheck=True)
class Encoder(Config):
    """Blocks over the source, whose mixers may see both directions; width, norms and embedding are the model's.

    Attributes:
      stages: mixers over depth.
      mlp: of every block; None leaves the MLPs out.
      positions: learned vectors added to the source's embedding, or None.
    """

    stages: tuple[Stage, ...] = chz.field(validator=requires(bool, "an encoder needs at least one stage"))
    mlp: MlpConfig | None = None
    positions: LearnedPositions | None = None

    @chz.validate
    def _reads_no_source(self) -> None:
        for stage in self.stages:
            for mixer in stage.pattern:
                if mixer.traits.cross or mixer.traits.landmark_block:
                    what = "reads a source" if mixer.traits.cross else "needs landmarks"
                    raise UserError(f"encoder.stages: {type(mixer).__name__} {what}, which an encoder does not have")

    def build(self, model: LanguageModel, rngs: nnx.Rngs) -> EncoderModule:
        """Returns the module of a model that has this encoder."""
        return EncoderModule(self, model, rngs)


class EncoderModule(nnx.Module):
    """The module of `Encoder`."""

    def __init__(self, config: Encoder, model: LanguageModel, rngs: nnx.Rngs):
        self.positions = None if config.positions is None else config.positions.build(model.width, rngs)
        alone = {"encoder": None, "projector": None, "classifier": None, "positions": None}
        self.stack = Stack(chz.replace(model, stages=config.stages, mlp=config.mlp, **alone), rngs)
        self.dtype = model.dtype
        self.final_norm = model.norm.build(model.width)

    def __call__(self, x: Float[Array, "b s d"], context: Context) -> Source:
        """Returns the source that cross mixers read, of embedded tokens."""
        if context.positions is None and context.segments is not None:
            context = dataclasses.replace(context, positions=document_positions(context.segments))
        if self.positions is not None:  # fp32 until here, as the stream's are
            x = x + self.positions(token_positions(context, *x.shape[:2]))
        hidden = self.final_norm(self.stack(x.astype(self.dtype), context).hidden)
        return Source(hidden, dataclasses.replace(context, token_ids=None, key=None))


def encode(module: LanguageModelModule, source: Source | None) -> Source:
    """Returns a source with the vectors that cross mixers read: its own, or those of its `context.token_ids`.

    Raises:
      UserError: there is no source, or it has neither.
    """
    if source is not None and source.hidden is not None:
        return source
    if source is None or source.context.token_ids is None or module.encoder is None:
        what = "Context(source=Source(context=Context(token_ids=...)))"
        raise UserError(f"a model with an encoder reads a source: call it with {what}")
    x = module.embedding[...][source.context.token_ids] * module.config.embedding_scale
    if module.projector is not None:
        x = module.projector(x, source.context)
    return module.encoder(x, source.context)


def example_source(length: int) -> Source:
    """Returns a source of so many tokens, all 0: costs do not depend on which."""
    return Source(context=Context(token_ids=jnp.zeros((1, length), jnp.int32)))
