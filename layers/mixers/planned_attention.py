"""Softmax attention at positions that follow from the tokens' fields (layers/modules/position_plans.py).

    PlannedAttention(plan="concentric", design=Concentric())    CCA: positions by ring
    PlannedAttention(plan="parallel", design=Parallel())        grids in one range of positions, in any order

Xing et al., CCA (arXiv 2410.15926), section 4; Ratner et al., Parallel Context Windows (arXiv 2212.10947). Masks read
the planned positions, too.

Easy to get wrong: tokens that share a position, such as those of a ring, can be told apart only by what they hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError
from recollect.layers.mixer import Context, MixerOutput, Place, Traits
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules import position_plans

WHOLE = "its positions follow from whole sequences"


@chz.chz(typecheck=True)
class PlannedAttention(SoftmaxConfig):
    """Attention at planned positions.

    Attributes:
      plan: where cells are.
    """

    plan: Literal["concentric", "parallel"] = "concentric"

    NOT_SERVED: ClassVar[Mapping[str, str]] = {
        "causal": "text behind a grid sees all of it as it is; a design states what cells see",
        "cross": "plans are of the tokens of one sequence",
    }

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, streams=False)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> PlannedSoftmaxAttention:
        return PlannedSoftmaxAttention(self, width, place, rngs)


class PlannedSoftmaxAttention(SoftmaxAttention):
    """The module of `PlannedAttention`."""

    config: PlannedAttention

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        fields = position_plans.fields_of(context, *x.shape[:2])
        positions = getattr(position_plans, self.config.plan)(fields)
        return super().__call__(x, dataclasses.replace(context, positions=positions))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> Any:
        raise UserError(f"PlannedAttention cannot stream or generate: {WHOLE}")
