"""Muon: orthogonalised momentum for the matrices of the layers, AdamW for everything else."""

from __future__ import annotations

from typing import Any, ClassVar

import chz
import jax
import optax

from recollect.configuration import requires
from recollect.models.functional import FunctionalModel
from recollect.training.optimizer import AdamW, Hyperparameters, below_one, positive

_INDICES = frozenset("ztwr")
"""Letters of dimensions that index and do not span a space: words, positions, taps, choices of a router."""


@chz.chz(typecheck=True)
class Muon(AdamW):
    """Muon (Jordan et al. 2024): the momentum of each matrix of the layers is orthogonalised by Newton-Schulz before it
    becomes a step.

    Matrices are parameters whose dimensions all span vector spaces, the kernels of linear maps: each layer's (and each
    head's, where there is one per head) by itself. Parameters with a dimension that indexes (words, positions, taps,
    choices of a router), norms, biases and Hyena's filters take AdamW's step. Steps of matrices are scaled by
    `matrix_rms` sqrt(max(inputs, outputs)), so that their root mean square is about AdamW's and both share a learning
    rate and a weight decay (Liu et al. 2025, Muon is scalable, section 2.2).

    Attributes:
      momentum: Nesterov momentum of the matrices' gradients.
      iterations: steps of Newton-Schulz.
      matrix_rms: see above.
    """

    momentum: float = chz.field(default=0.95, validator=below_one)
    iterations: int = chz.field(
        default=5, validator=requires(lambda value: value >= 1, "must be at least 1 (5 is usual)")
    )
    matrix_rms: float = chz.field(default=0.2, validator=positive)

    VALUES: ClassVar[tuple[str, ...]] = (*AdamW.VALUES, "momentum")

    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        muon = optax.contrib.scale_by_muon(
            ns_steps=self.iterations,
            beta=values["momentum"],
            weight_dimension_numbers=lambda updates: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates
            ),
        )
        scale = optax.stateless_with_tree_map(
            lambda update, _: update * (self.matrix_rms * max(update.shape[-2:]) ** 0.5)
        )
        others = super().direction(model, values)
        return optax.partition({"matrix": optax.chain(muon, scale), "other": others}, self.labels(model))

    def labels(self, model: FunctionalModel) -> Any:
        """Returns "matrix" or "other" for every parameter."""

        def label(dims: str, decay: bool, group: str, trainable: bool) -> str:
            letters = [word[0] for word in dims.split()]
            matrix = len(letters) > 1 and not _INDICES.intersection(letters)
            return "matrix" if matrix and decay and trainable and group == "default" else "other"

        return jax.tree.map(label, *(model.tags(name) for name in ("dims", "decay", "group", "trainable")))
