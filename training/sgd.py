"""SGD with momentum."""

from __future__ import annotations

from typing import ClassVar

import chz
import optax

from recollect.models.functional import FunctionalModel
from recollect.training.optimizer import Hyperparameters, Optimizer, below_one


@chz.chz(typecheck=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013); weight decay is decoupled (SGDW, Loshchilov &
    Hutter 2019, algorithm 1).

    Attributes:
      momentum: share of the last update's direction that is kept; 0 is plain gradient descent.
      nesterov: look ahead along the momentum.
    """

    momentum: float = chz.field(default=0.9, validator=below_one)
    nesterov: bool = False

    VALUES: ClassVar[tuple[str, ...]] = (*Optimizer.VALUES, "momentum")

    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        return optax.trace(decay=values["momentum"], nesterov=self.nesterov)
