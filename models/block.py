"""One layer of the stack: pre-norm residual mixer, then pre-norm residual MLP (none in the recall studies)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.mixer import Context, MixerConfig, MixerOutput, Place, State
from recollect.layers.modules.mlp import MlpConfig
from recollect.layers.modules.norms import NormConfig


class Block(nnx.Module):
    """x = x + mixer(norm(x));  x = x + mlp(norm(x))."""

    PARTS: ClassVar[tuple[str, ...]] = ("mixer_norm", "mixer", "mlp_norm", "mlp")
    """Attributes that hold parameters, in the order of the forward pass."""

    def __init__(
        self, mixer: MixerConfig, norm: NormConfig, mlp: MlpConfig | None, width: int, place: Place, rngs: nnx.Rngs
    ):
        self.mixer_norm = norm.build(width)
        self.mixer = mixer.build(width, place, rngs)
        self.mlp_norm = None if mlp is None else norm.build(width)
        self.mlp = None if mlp is None else mlp.build(width, place, rngs)

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> MixerOutput:
        """Returns the stream after the layer, and the mixer's losses and metrics."""
        return self._rest(x, self.mixer(self.mixer_norm(x), context))

    def branches(self, x: Float[Array, "b t d"], context: Context) -> dict[str, Float[Array, "b t d"]]:
        """Returns what the parts add to x, "mixer" and "mlp", and their "sum" with it."""
        parts = {"mixer": self.mixer(self.mixer_norm(x), context).hidden}
        x = x + parts["mixer"]
        if self.mlp is not None and self.mlp_norm is not None:
            parts["mlp"] = self.mlp(self.mlp_norm(x))
            x = x + parts["mlp"]
        return {**parts, "sum": x}

    def extend(self, x: Float[Array, "b t d"], state: State, context: Context) -> tuple[MixerOutput, State]:
        """Returns the stream after the layer at the next tokens, and the mixer's state after them."""
        out, state = self.mixer.extend(self.mixer_norm(x), state, context)
        return self._rest(x, out), state

    def _rest(self, x: Float[Array, "b t d"], out: MixerOutput) -> MixerOutput:
        x = x + out.hidden
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return dataclasses.replace(out, hidden=x)
