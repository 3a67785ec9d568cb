"""Mixers that read tokens in order, used where no order is given: one module reads a row forward and one backward.

    y = forward(x) + reversed(backward(reversed(x)))

as in bidirectional recurrent networks (Schuster & Paliwal 1997) and state space models (Zhu et al. 2024, "Vision
Mamba"). A document is reversed within its row, so that packed rows stay packed rows. With tied weights a model of such
layers alone cannot tell left from right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from recollect.configuration import UserError
from recollect.layers.mixer import Context, Mixer, MixerConfig, MixerOutput, Place, State
from recollect.layers.traits import Traits
from recollect.pallas_kernels.segments import document_starts


@chz.chz(typecheck=True)
class DirectedConfig(MixerConfig):
    """Base of the configs of mixers that read forward, or in both directions.

    Attributes:
      causal: read forward; False: in both directions, whose outputs are added.
      tied: with causal=False, both directions have the same weights.
    """

    NOT_SERVED: ClassVar[Mapping[str, str]] = {"cross": "its state follows the order of one sequence's tokens"}

    causal: bool = True
    tied: bool = False

    @chz.validate
    def _has_two_directions_to_tie(self) -> None:
        if self.tied and self.causal:
            raise UserError("tied=True shares weights between two directions: set causal=False, or leave it out")

    @property
    def traits(self) -> Traits:
        if self.causal:
            return Traits()
        return Traits(causal=False, streams=False, symmetry="reversal" if self.tied else None)

    def in_each_direction(
        self, module: Callable[..., Mixer], width: int, place: Place, rngs: nnx.Rngs, **options: Any
    ) -> Any:
        """Returns the module, or where it reads in both directions `BothDirections` of two, or of one that is tied."""
        number = 1 if self.causal or self.tied else 2
        modules = [module(self, width, place, rngs, **options) for _ in range(number)]
        return modules[0] if self.causal else BothDirections(self, *modules)


class BothDirections(Mixer):
    """The module of a `DirectedConfig` with causal=False."""

    def __init__(self, config: DirectedConfig, forward: Mixer, backward: Mixer | None = None):
        self.config = config
        self.forward = forward
        if backward is not None:
            self.backward = backward

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        module = self.forward if self.config.tied else self.backward
        back = module(backward(x), backward_context(context))
        return MixerOutput(self.forward(x, context).hidden + backward(back.hidden))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> State:
        name = type(self.config).__name__
        raise UserError(f"{name}(causal=False) reads later tokens, so it cannot stream or generate")


def backward(x: Shaped[Array, "b t *rest"]) -> Shaped[Array, "b t *rest"]:
    """Returns the rows with their tokens in reversed order."""
    return jnp.flip(x, 1)


def backward_context(context: Context) -> Context:
    """Returns what is known of the tokens in reversed order: positions count from the last token of each document."""
    by_token = ("positions", "segments", "token_types", "token_ids", "fields")
    fields = {name: jax.tree.map(backward, getattr(context, name)) for name in by_token}
    if context.positions is not None:
        fields["positions"] = _from_the_first(**{name: fields[name] for name in ("positions", "segments")})
    return dataclasses.replace(context, **fields)


def _from_the_first(positions: Int[Array, "b t"], segments: Int[Array, "b t"] | None) -> Int[Array, "b t"]:
    """Returns how far below the first token's position of its document each token's is."""
    if segments is None:
        return positions[:, :1] - positions
    start = jax.lax.cummax(jnp.where(document_starts(segments), jnp.arange(segments.shape[1]), 0), axis=1)
    return jnp.take_along_axis(positions, start, axis=1) - positions
