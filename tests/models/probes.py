"""Small models and mixers that the tests of models share."""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recollect.layers.mixer import Context, Mixer, MixerConfig, MixerOutput, Place, Traits
from recollect.layers.modules.linear import parameter
from recollect.models import FunctionalModel, LanguageModel
from recollect.models.functional import flatten, nest


@chz.chz(typecheck=True)
class PlaceProbe(MixerConfig):
    """Adds nothing; reports its layer index (once more as a loss if `loses`) and allows inputs of `limit`."""

    loses: bool = False
    limit: int | None = None

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> PlaceProbeMixer:
        return PlaceProbeMixer(self, place, rngs)

    @property
    def traits(self) -> Traits:
        return Traits(maximum_length=self.limit)


class PlaceProbeMixer(Mixer):
    def __init__(self, config: PlaceProbe, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.index = parameter(jnp.asarray(place.index, jnp.float32), "", group="places", trainable=False)
        self.noise = parameter(jax.random.normal(rngs.params(), (3,)), "f", decay=True)

    def __call__(self, x: jax.Array, context: Context = Context()) -> MixerOutput:
        losses = {"probe": 10 * self.index[...]} if self.config.loses else {}
        return MixerOutput(jnp.zeros_like(x), losses, {"index": self.index[...]})


def functional(vocabulary: int = 23, **fields) -> tuple[FunctionalModel, dict]:
    """A model and parameters large enough that every path matters (drawn in numpy: compiling an initialisation takes
    longer)."""
    model = FunctionalModel(LanguageModel(**fields), vocabulary)
    rng = np.random.default_rng(0)
    drawn = {
        tuple(name.split(".")): jnp.asarray(0.25 * rng.normal(size=leaf.shape) + name.endswith("gain"), jnp.float32)
        for name, leaf in flatten(model.abstract_params()).items()
    }
    return model, nest(drawn)


def error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-12))
