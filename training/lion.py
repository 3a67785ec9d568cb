"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import ClassVar

import chz
import optax

from recollect.configuration import requires
from recollect.models.functional import FunctionalModel
from recollect.training.optimizer import Hyperparameters, Optimizer

_below_one = requires(lambda value: 0 <= value < 1, "must be in [0, 1)")


@chz.chz(typecheck=True)
class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2). Its updates are larger than AdamW's: the paper takes a
    learning rate 3 to 10 times smaller and a weight decay as many times larger.

    Attributes:
      learning_rate: its peak.
      beta1: share of the momentum in the update's direction.
      beta2: decay of the momentum.
    """

    learning_rate: float = chz.field(default=1e-4, validator=requires(lambda value: value > 0, "must be positive"))
    beta1: float = chz.field(default=0.9, validator=_below_one)
    beta2: float = chz.field(default=0.99, validator=_below_one)

    VALUES: ClassVar[tuple[str, ...]] = (*Optimizer.VALUES, "beta1", "beta2")

    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        return optax.scale_by_lion(b1=values["beta1"], b2=values["beta2"])
