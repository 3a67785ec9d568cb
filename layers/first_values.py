"""Values of an early layer that later ones mix into their own, inside modules that know nothing of each other.

    with holding(None) as held:
        first(x, context)                 # calls give(values)
        later(x, context)                 # calls given(values), which are the first layer's

They are looked up while the program is traced, as the stream of layers/convolved.py is. `ValueStack` of
models/value_stack.py carries them from layer to layer where layers are scanned.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Float

from recollect.configuration import UserError


@dataclasses.dataclass
class Held:
    """What is held; None before any layer gave values."""

    values: Float[Array, "b t f"] | None


_held: contextvars.ContextVar[Held | None] = contextvars.ContextVar("held", default=None)


@contextlib.contextmanager
def holding(values: Float[Array, "b t f"] | None) -> Iterator[Held]:
    """Holds values, those that layers give inside in place of these; yields them."""
    before = _held.set(held := Held(values))
    try:
        yield held
    finally:
        _held.reset(before)


def give(values: Float[Array, "b t f"]) -> None:
    """Makes `values` those that later layers read, if there are any."""
    if (held := _held.get()) is not None:
        held.values = values


def given(like: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
    """Returns the values of an earlier layer; zeros where none gave any, as where shapes alone are of interest.

    Raises:
      UserError: the layer is not part of a model.
    """
    held = _held.get()
    if held is None:
        raise UserError("value_residual=True reads an earlier layer's values: it needs a model, and a layer before it")
    return jnp.zeros_like(like) if held.values is None else held.values.astype(like.dtype)
