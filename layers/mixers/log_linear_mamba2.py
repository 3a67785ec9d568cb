"""Log-linear Mamba-2: Mamba-2 whose states of 1, 2, 4, ... past tokens have weights of their own.

    y_t = sum_l lambda_t^(l) S_t^(l)^T C_t + D x_t,   lambda_t^(l) = softplus(scale_l (W_l u_t))   per head

Guo et al. 2025 (2506.04761); the levels are in layers/fenwick_levels.py, all else is Mamba-2's. As published: 15
levels, for documents of up to 2^14 tokens, and scales that start at 1. Each level costs a recurrence; a sequence
computes log2 of its length of them. State: (k x v) fp32 per head and level above 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.fenwick_levels import LevelWeights, longest, recurrence_by_levels
from recollect.layers.mixer import Place, Traits
from recollect.layers.mixers.mamba2 import Mamba2, Mamba2Mixer
from recollect.layers.modules import Linear, torch_uniform
from recollect.layers.recurrent import Stream


@chz.chz(typecheck=True)
class LogLinearMamba2(Mamba2):
    """Log-linear Mamba-2.

    Attributes:
      levels: the token itself, and 1, 2, 4, ... tokens before it: documents of up to 2^(levels - 1) tokens.
    """

    levels: int = chz.field(default=15, validator=at_least(2))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> LogLinearMamba2Mixer:
        return self.in_each_direction(LogLinearMamba2Mixer, width, place, rngs)

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, maximum_length=longest(self.levels))


class LogLinearMamba2Mixer(Mamba2Mixer):
    """The module of `LogLinearMamba2`."""

    def __init__(self, config: LogLinearMamba2, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        projection = Linear(width, config.heads * config.levels, "d hr", rngs, init=torch_uniform())
        self.levels = LevelWeights(config.heads, config.levels, projection)

    def recurrence(self, x: Float[Array, "b t d"], stream: Stream, **operands: Any) -> Float[Array, "b t h v"]:
        return recurrence_by_levels(stream, self.levels(x), **operands)
