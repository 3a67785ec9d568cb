"""One layer of the stack: pre-norm residual mixer, then pre-norm residual MLP (none in the recall studies)."""

from __future__ import annotations

import jax
from flax import nnx

from recollect.layers.mixer import Context, MixerConfig, MixerOutput, Place, State
from recollect.layers.modules.mlp import MlpConfig
from recollect.layers.modules.norms import NormConfig


class Block(nnx.Module):
    """x = x + mixer(norm(x));  x = x + mlp(norm(x))."""

    def __init__(
        self, mixer: MixerConfig, norm: NormConfig, mlp: MlpConfig | None, width: int, place: Place, rngs: nnx.Rngs
    ):
        self.mixer_norm = norm.build(width)
        self.mixer = mixer.build(width, place, rngs)
        self.mlp_norm = None if mlp is None else norm.build(width)
        self.mlp = None if mlp is None else mlp.build(width, place, rngs)

    def __call__(self, x: jax.Array, context: Context) -> MixerOutput:
        return self._rest(x, self.mixer(self.mixer_norm(x), context))

    def branches(self, x: jax.Array, context: Context) -> dict[str, jax.Array]:
        """What the parts add to x, "mixer" and "mlp" (b, t, d), and their "sum" with it."""
        found = {"mixer": self.mixer(self.mixer_norm(x), context).hidden}
        x = x + found["mixer"]
        if self.mlp is not None and self.mlp_norm is not None:
            found["mlp"] = self.mlp(self.mlp_norm(x))
            x = x + found["mlp"]
        return {**found, "sum": x}

    def extend(self, x: jax.Array, state: State, context: Context) -> tuple[MixerOutput, State]:
        out, state = self.mixer.extend(self.mixer_norm(x), state, context)
        return self._rest(x, out), state

    def _rest(self, x: jax.Array, out: MixerOutput) -> MixerOutput:
        x = x + out.hidden
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return MixerOutput(x, out.losses, out.metrics)
