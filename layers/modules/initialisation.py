"""Initial values that a model's config states, for all its layers.

    ZOOLOGY         N(0, 0.02), into the residual stream N(0, 0.02 / sqrt(2 layers)): also the project's own
    FLA             N(0, 0.02) everywhere (flash-linear-attention)
    GLA             uniform, of variance gain^2 2 / (inputs + outputs), gain 2^-2.5 (Yang et al. 2023, their code)
    ACTIVE_DORMANT  torch's defaults: uniform on (-1/sqrt(inputs), 1/sqrt(inputs)), embeddings N(0, 1) (Guo et al. 2024)

Layers that prescribe initial values of their own keep them (decays, convolutions, Mamba-2's and RWKV-7's projections);
biases start at 0 in all.
"""

from __future__ import annotations

from typing import Literal

import chz

from recollect.configuration import Config, requires
from recollect.layers.modules.initial_values import torch_uniform, uniform
from recollect.layers.modules.linear import Initializer, normal

_positive = requires(lambda value: 0 < value < float("inf"), "must be positive and finite")


@chz.chz(typecheck=True)
class Initialisation(Config):
    """Initial values of matrices and embeddings.

    Attributes:
      matrices: "normal", N(0, gain); "xavier", uniform of variance gain^2 2 / (inputs + outputs); "torch", gain times
        uniform on (-1/sqrt(inputs), 1/sqrt(inputs)).
      gain: see there.
      scaled_outputs: matrices that write to the residual stream are divided by sqrt(2 layers).
      embedding: standard deviation of the vectors of tokens and positions.
    """

    matrices: Literal["normal", "xavier", "torch"] = "normal"
    gain: float = chz.field(default=0.02, validator=_positive)
    scaled_outputs: bool = True
    embedding: float = chz.field(default=0.02, validator=_positive)

    def matrix(self, factor: float = 1.0) -> Initializer:
        """Returns the initializer of matrices (inputs, outputs), times `factor`."""
        gain = self.gain * factor
        if self.matrices == "normal":
            return normal(gain)
        if self.matrices == "torch":
            return torch_uniform(gain)
        return lambda key, shape, dtype: uniform(gain * (6 / sum(shape)) ** 0.5)(key, shape, dtype)

    def output(self, depth: int) -> Initializer:
        """Returns the initializer of matrices that write to the residual stream of so many layers."""
        return self.matrix((2 * depth) ** -0.5 if self.scaled_outputs else 1.0)


ZOOLOGY = Initialisation()
FLA = Initialisation(scaled_outputs=False)
GLA = Initialisation(matrices="xavier", gain=2**-2.5, scaled_outputs=False)
ACTIVE_DORMANT = Initialisation(matrices="torch", gain=1.0, scaled_outputs=False, embedding=1.0)
