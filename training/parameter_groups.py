"""Learning-rate factors by parameter group."""

from __future__ import annotations

from typing import Any

import chz
import jax
import optax

from recollect.configuration import Config, UserError
from recollect.models.functional import FunctionalModel


@chz.chz(typecheck=True)
class GroupRate(Config):
    """Parameters tagged with `group` learn at `factor` times the learning rate."""

    group: str
    factor: float


def scaled_by_group(model: FunctionalModel, groups: tuple[GroupRate, ...]) -> optax.GradientTransformation:
    """Returns the transformation that scales the update of each group's parameters by its factor.

    Raises:
      UserError: no parameter of the model has one of the groups.
    """
    factors = {group.group: group.factor for group in groups}
    tags = model.tags("group")
    unknown = set(factors) - set(jax.tree.leaves(tags))
    if unknown:
        known = ", ".join(sorted(set(jax.tree.leaves(tags))))
        raise UserError(
            f"optimizer.groups names {', '.join(sorted(unknown))}; this model's parameter groups are {known}"
        )

    def scale(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda update, tag: update * factors.get(tag, 1.0), updates, tags)

    return optax.stateless(scale)
