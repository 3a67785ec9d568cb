"""How many tokens a decode state has room for, and what happens to those that do not fit.

A state that keeps every token has as many slots as `init_state` was asked for. Outside of jit, tokens that do not fit
are refused. A compiled function cannot raise and must not wait for the host: there they are dropped, and `count`, the
number of tokens given, passes the number of slots. That is the flag. It is kept anyway, so it costs neither bytes nor
time; it stays up for the rest of the stream, and the next call outside of jit raises on it, as `check_capacity` does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from recollect.configuration import UserError
from recollect.layers.mixer import Context, Cursor


class BoundedState:
    """Base of states with one slot per token.

    Attributes:
      segments: of each slot; 0 marks a free one.
      count: tokens given so far, also those that found no slot.
    """

    segments: Int[Array, "b s"]
    count: Int[Array, " b"]

    @property
    def capacity(self) -> int | None:
        """Tokens that fit into a row; None where old ones make room for new ones."""
        return self.segments.shape[-1]


def check_capacity(state: Any, segments: Int[Array, "b t"] | None = None, what: str = "tokens") -> None:
    """Raises UserError where tokens were dropped inside a compiled function, or where new ones, those of `segments`
    that are not padding, do not fit into every part of a state. Does nothing inside jit: the numbers are not known.

    `extend` calls it. After a loop that is compiled as a whole, call it with the state alone.
    """
    for part in bounded_parts(state):
        if not _is_known(part.count):
            continue
        held = np.asarray(part.count)
        added = np.zeros_like(held)
        if segments is not None and _is_known(segments):
            added = np.sum(np.asarray(segments) != 0, axis=-1)
        row = np.unravel_index(np.argmax(held + added), held.shape)
        if held[row] > part.capacity:
            raise UserError(
                f"a compiled function gave this state {held[row]} {what}; it has room for {part.capacity} and dropped "
                "the others: start again with a max_length of init_state that fits the stream"
            )
        if held[row] + added[row] > part.capacity:
            raise UserError(
                f"this state has room for {part.capacity} {what}; it holds {held[row]}, and {added[row]} more do not "
                "fit: give init_state a max_length that fits the stream"
            )


def check_positions(cursor: Cursor, tokens: Context, maximum: int | None) -> None:
    """Raises UserError where a token that is not padding stands past a table of `maximum` positions (None: there is
    none), or an earlier one of its document did; `tokens` is from `cursor.read`. Does nothing inside jit: NaN is read
    there."""
    if maximum is None or not all(map(_is_known, (cursor.position, tokens.positions, tokens.segments))):
        return
    after = np.where(np.asarray(tokens.segments) != 0, np.asarray(tokens.positions) + 1, 0)
    reached = max(int(np.max(cursor.position)), int(np.max(after, initial=0)))
    if reached > maximum:
        raise UserError(f"a document of this stream has {reached} tokens so far; the model has positions for {maximum}")


def overfull(state: Any) -> Bool[Array, ""]:
    """Returns whether any part of a state was given more tokens than fit; inside jit too."""
    full = [jnp.any(part.count > part.capacity) for part in bounded_parts(state)]
    return jnp.any(jnp.stack(full)) if full else jnp.zeros((), bool)


def bounded_parts(state: Any) -> list[Any]:
    """Returns the parts of a state that have a capacity."""
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, BoundedState))
    return [part for part in parts if isinstance(part, BoundedState) and part.capacity is not None]


def _is_known(array: Any) -> bool:
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)
