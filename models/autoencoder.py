"""A model whose head sees one vector per sequence: what its last token has taken up of all others (MAD's bottleneck).

    z = stack(embedding)_T                       the stream at the last of T tokens
    y_t = gelu(W2 norm(gelu(W1 norm(z + sin_t))))        for t = 0 .. T - 1
    logits_t = head(norm(y_t))

sin_t are sinusoids of the position. On `Compression`, whose labels are its input, the score is how much of a sequence
fits into a vector of the model's width.

Source: Poli et al., Mechanistic Design and Scaling of Hybrid Architectures (MAD, arXiv 2403.17844); athms/mad-lab,
mad/model/auto_encoder.py with the last token's pool. Its head has a bias, which heads here do not have.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import UserError
from recollect.layers.mixer import Context, MixerOutput
from recollect.layers.modules.linear import Linear, initialised_by
from recollect.models.language_model import LanguageModel, LanguageModelModule

LAYERS = 2


@chz.chz(typecheck=True)
class Autoencoder(LanguageModel):
    """A model that predicts all tokens of a sequence from the vector of its last one. Rows hold one sequence each,
    without padding, and nothing can be generated."""

    @chz.validate
    def _has_a_last_token(self) -> None:
        if self.landmark_block is not None:
            raise UserError("Autoencoder reads the last token's vector, after which mixers with landmarks put another")
        if self.width % 2 or self.width < 4:
            raise UserError(f"model.width={self.width}: sinusoids need an even width of at least 4")

    def build(self, vocabulary: int, rngs: nnx.Rngs) -> AutoencoderModule:
        """Returns the module for a vocabulary of this size."""
        with initialised_by(self.initialisation):
            return AutoencoderModule(self, vocabulary, rngs)


class AutoencoderModule(LanguageModelModule):
    """The module of `Autoencoder`."""

    def __init__(self, config: LanguageModel, vocabulary: int, rngs: nnx.Rngs):
        super().__init__(config, vocabulary, rngs)
        width = config.width
        self.decoder_norms = nnx.List([config.norm.build(width) for _ in range(LAYERS)])
        self.decoder = nnx.List([Linear(width, width, "d f", rngs, bias=True) for _ in range(LAYERS)])

    def hidden(self, tokens: Int[Array, "b t"], context: Context = Context()) -> MixerOutput:
        """Returns what the head takes; raises UserError for packed or padded rows, which have no one last token."""
        if context.segments is not None:
            raise UserError("Autoencoder takes rows of one sequence each, without padding")
        return super().hidden(tokens, context)

    def leave(self, x: Float[Array, "b t d"], layout: Any = None) -> Float[Array, "b t d"]:
        """Returns what the head takes, decoded from the last token's vector alone."""
        y = x[:, -1:] + sinusoids(x.shape[1], x.shape[2]).astype(x.dtype)
        for norm, linear in zip(self.decoder_norms, self.decoder, strict=True):
            y = jax.nn.gelu(linear(norm(y)), approximate=False)
        return self.final_norm(y)

    def extend(self, *arguments: Any, **more: Any) -> NoReturn:
        """Raises UserError: what the model predicts has to be read first."""
        raise UserError("Autoencoder predicts what it has read: it generates nothing; take LanguageModel")


def sinusoids(length: int, width: int) -> Float[Array, "t d"]:
    """Returns vectors of positions, half sines and half cosines, of rates from 1 to 1 / 10,000 (Vaswani et al. 2017,
    section 3.5, in the order of fairseq, which MAD follows)."""
    rates = jnp.exp(jnp.arange(width // 2, dtype=jnp.float32) * (-math.log(10_000.0) / (width // 2 - 1)))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
