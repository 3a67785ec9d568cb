"""How a model streams: the next tokens of each row through embedding, stack and states, which `init_state` makes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.layers.context import Context
from recollect.layers.mixer import Cursor, State
from recollect.layers.state.capacity import check_capacity, check_positions
from recollect.models import landmarks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """One state per layer, and where the stream stands in ordinary tokens."""

    layers: tuple[State, ...]
    cursor: Cursor


class StackStreams(nnx.Module):
    """What `Stack` does with streams."""

    layers: Any

    def extend(
        self, x: Float[Array, "b t d"], states: tuple[State, ...], context: Context
    ) -> tuple[Float[Array, "b t d"], tuple[State, ...]]:
        """Returns the stream after all layers at the next tokens, and the states after them. Unrolled: a scan that
        carries caches in and out copies them at every token."""
        after = []
        for block, state in zip(self.layers(), states, strict=True):
            out, state = block.extend(x, state, context)
            x = out.hidden
            after.append(state)
        return x, tuple(after)


class ModelStreams(nnx.Module):
    """What `LanguageModelModule` does with streams."""

    config: Any
    stack: Any
    leave: Any
    _embed: Any

    def extend(
        self, tokens: Int[Array, "b t"], state: ModelState, context: Context = Context()
    ) -> tuple[Float[Array, "b t d"], ModelState]:
        """Returns the hidden vectors of the next tokens, and the state after them. Tokens of segment 0 are padding.

        Tokens for which the state has no room raise UserError before any layer runs; inside jit they are dropped, and
        the next call outside of it raises (layers/state/capacity.py).
        """
        fields, cursor = state.cursor.read(dataclasses.replace(context, token_ids=tokens), *tokens.shape)
        check_positions(state.cursor, fields, None if self.config.positions is None else self.config.positions.maximum)
        x, fields, layout = landmarks.inserted(self, self._embed(tokens, fields), fields, from_start=False)
        check_capacity(state.layers, fields.segments, "tokens" if layout is None else "tokens, landmarks counted")
        x, layers = self.stack.extend(x, state.layers, fields)
        return self.leave(x, layout), ModelState(layers, cursor)
