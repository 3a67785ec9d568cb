"""An optimizer for a part of a model's parameters: the others are not moved, decayed or given any state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from recollect.configuration.io import flatten
from recollect.models.adaptation import nested
from recollect.models.functional import FunctionalModel, Params


def trained_part(
    make: Callable[[Any], optax.GradientTransformation], model: FunctionalModel
) -> optax.GradientTransformation:
    """Returns the transformation that `make` makes for the trained parameters of `model`; updates of others are 0.

    Args:
      make: of a model that has no parameters but those.
    """
    names = {name for name, trained in flatten(model.tags("trainable")).items() if trained}

    def part(tree: Params) -> Params:
        return nested({name: leaf for name, leaf in flatten(tree).items() if name in names})

    class TrainedPart:
        """The model, of which only trained parameters have tags."""

        def tags(self, name: str) -> Params:
            return part(model.tags(name))

    inner = make(TrainedPart())

    def update(updates: Params, state: Any, params: Any = None) -> tuple[Params, Any]:
        moved, state = inner.update(part(updates), state, None if params is None else part(params))
        flat = flatten(jax.tree.map(jnp.zeros_like, updates)) | flatten(moved)
        return nested(flat), state

    return optax.GradientTransformation(lambda params: inner.init(part(params)), update)
