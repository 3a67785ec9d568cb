"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import ClassVar

import chz
import optax

from recollect.models.functional import FunctionalModel
from recollect.training.optimizer import Hyperparameters, Optimizer, below_one, positive


@chz.chz(typecheck=True)
class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2). Its updates are larger than AdamW's: the paper takes a
    learning rate 3 to 10 times smaller and a weight decay as many times larger.

    Attributes:
      learning_rate: its peak.
      beta1: share of the momentum in the update's direction.
      beta2: decay of the momentum.
    """

    learning_rate: float = chz.field(default=1e-4, validator=positive)
    beta1: float = chz.field(default=0.9, validator=below_one)
    beta2: float = chz.field(default=0.99, validator=below_one)

    VALUES: ClassVar[tuple[str, ...]] = (*Optimizer.VALUES, "beta1", "beta2")

    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        return optax.scale_by_lion(b1=values["beta1"], b2=values["beta2"])
