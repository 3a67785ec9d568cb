"""Depth where layers mix an early layer's values into their own (RWKV-7): the stream carries these values beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError
from recollect.layers.context import Context
from recollect.layers.first_values import holding
from recollect.layers.mixer import MixerOutput, State
from recollect.models.rematerialisation import rematerialised
from recollect.models.stack import Stack


class ValueStack(Stack):
    """A stack whose mixers with `value_residual` read the values of the last one before them that has none."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        mixers = [mixer for mixer in config.mixers if hasattr(mixer, "value_residual")]
        name = type(mixers[0]).__name__
        if mixers[0].value_residual:
            raise UserError(f"the first {name} has no values before it to mix in: set value_residual=False there")
        sizes = {(size.heads, size.value_dim) for size in (mixer.sizes(config.width) for mixer in mixers)}
        if len(sizes) > 1:
            raise UserError(f"value_residual=True needs heads and value_dim of every {name} to be equal")
        super().__init__(config, rngs)
        heads, dim = sizes.pop()
        self.width, self.channels = config.width, heads * dim
        # What a layer gives must not leave a rematerialised function beside its outputs: `_period` wraps all of it.
        self.outer_remat, self.remat = self.remat, "none"

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> MixerOutput:
        beside = jnp.zeros((*x.shape[:2], self.channels), x.dtype)
        out = super().__call__(jnp.concatenate([x, beside], axis=-1), context)
        return dataclasses.replace(out, hidden=out.hidden[..., : self.width])

    def extend(
        self, x: Float[Array, "b t d"], states: tuple[State, ...], context: Context
    ) -> tuple[Float[Array, "b t d"], tuple[State, ...]]:
        with holding(None):
            return super().extend(x, states, context)

    def _period(self, context: Context) -> Any:
        run = super()._period(context)

        def carrying(wide: jax.Array, part: Any) -> tuple[jax.Array, Any]:
            x, first = jnp.split(wide, [self.width], axis=-1)
            with holding(first) as held:
                x, layers = run(x, part)
            values: Any = held.values
            return jnp.concatenate([x, values], axis=-1), layers

        return carrying if self.outer_remat == "none" else rematerialised(carrying, self.outer_remat)
