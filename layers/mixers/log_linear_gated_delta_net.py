"""Log-linear Gated DeltaNet: Gated DeltaNet whose states of 1, 2, 4, ... past tokens have weights of their own.

    o_t = sum_l lambda_t^(l) S_t^(l)^T q_t / sqrt(k),   lambda_t^(l) = softplus(scale_l (W_l x_t))   per head

A level's state holds what its tokens wrote, less what every token since erased. Guo et al. 2025 (2506.04761); the
levels are in layers/fenwick_levels.py, all else is Gated DeltaNet's. As published: 15 levels, for documents of up to
2^14 tokens, and scales that start at 1. Each level costs a recurrence; a sequence computes log2 of its length of them.
State: (k x v) fp32 per head and level above 0.
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
from recollect.layers.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetMixer
from recollect.layers.modules import Linear
from recollect.layers.recurrent import Stream


@chz.chz(typecheck=True)
class LogLinearGatedDeltaNet(GatedDeltaNet):
    """Log-linear Gated DeltaNet.

    Attributes:
      levels: the token itself, and 1, 2, 4, ... tokens before it: documents of up to 2^(levels - 1) tokens.
    """

    levels: int = chz.field(default=15, validator=at_least(2))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> LogLinearGatedDeltaNetMixer:
        return self.in_each_direction(LogLinearGatedDeltaNetMixer, width, place, rngs)

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, maximum_length=longest(self.levels))


class LogLinearGatedDeltaNetMixer(GatedDeltaNetMixer):
    """The module of `LogLinearGatedDeltaNet`."""

    def __init__(self, config: LogLinearGatedDeltaNet, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, norm_epsilon=config.norm_epsilon)
        projection = Linear(width, config.heads * config.levels, "d hr", rngs)
        self.levels = LevelWeights(config.heads, config.levels, projection)

    def recurrence(self, x: Float[Array, "b t d"], stream: Stream, **operands: Any) -> Float[Array, "b t h v"]:
        return recurrence_by_levels(stream, self.levels(x), **operands)
