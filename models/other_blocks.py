"""Blocks other than the plain one: with Canon layers, or of a normalised stream."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError
from recollect.layers.context import Context
from recollect.layers.mixer import MixerConfig, MixerOutput, Place, State
from recollect.models.stack import Block


class NormalisedBlock(Block):
    """y = norm(x), x = y + mixer(y);  y = norm(x), x = y + mlp(y)  (MiniMax-01, as in transformers)."""

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> MixerOutput:
        y = self.mixer_norm(x)
        return self._rest(y, self.mixer(y, context))

    def extend(self, x: Float[Array, "b t d"], state: State, context: Context) -> tuple[MixerOutput, State]:
        """Returns the stream after the layer at the next tokens, and the mixer's state after them."""
        y = self.mixer_norm(x)
        out, state = self.mixer.extend(y, state, context)
        return self._rest(y, out), state

    def _rest(self, x: Float[Array, "b t d"], out: MixerOutput) -> MixerOutput:
        x = x + out.hidden
        if self.mlp is not None and self.mlp_norm is not None:
            y = self.mlp_norm(x)
            x = y + self.mlp(y)
        return dataclasses.replace(out, hidden=x)


def other_block(mixer: MixerConfig, config: Any, place: Place, rngs: nnx.Rngs) -> Block:
    """Returns the block of a model with `canon` or another `residual`; raises UserError where it has both."""
    if config.residual == "stream":
        from recollect.models.canon_block import CanonBlock

        return CanonBlock(mixer, config, place, rngs)
    if config.canon is not None:
        raise UserError(f"residual={config.residual!r}: Canon layers stand in blocks that add to the stream")
    return NormalisedBlock(mixer, config, place, rngs)
