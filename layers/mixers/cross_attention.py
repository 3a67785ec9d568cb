"""Cross attention: queries from the stream, keys and values from another sequence.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(k)) v_j        over the source's tokens j of i's document

Vaswani et al. 2017, section 3.2.3. It is no mixer of its own but what those of the softmax family do with `cross=True`,
each with its own projections, gates and outputs. No output depends on another query, so one config serves both cross
patterns (layers/patterns.py). State: the source's keys and values, projected once.

Easy to get wrong: documents of stream and source belong together by their segment numbers, so one side with segments
needs them on the other, where None is all 1; positions compare an index in the stream with one in the source.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.configuration import UserError
from recollect.layers.context import Context, Source
from recollect.layers.mixer import Cursor, Mixer, MixerOutput, zero_padding
from recollect.layers.modules.dropout import kept_weights
from recollect.layers.modules.masking import further_fields
from recollect.layers.packing import token_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceState:
    """What a stream keeps of its source: keys, values (or trees of (b, s, ...)) and fields of its tokens, and where the
    stream stands."""

    keys: Any
    values: Any
    positions: Int[Array, "b s"]
    segments: Int[Array, "b s"]
    further: dict[str, Int[Array, "b s"]]
    cursor: Cursor


class CrossReader(Mixer):
    """Base of softmax mixers: what they do where their config has `cross=True`."""

    def init_cross_state(self, source: Source, dtype: Any = jnp.float32) -> SourceState:
        """Returns the source's keys and values, stored in `dtype`."""
        keys, values, fields = self._source(source)
        keys, values = _floats_as(dtype, (keys, values))
        positions = fields["key_positions"]
        segments = jnp.ones_like(positions) if fields["key_segments"] is None else fields["key_segments"]
        cursor = Cursor.start(positions.shape[0])
        return SourceState(keys, values, positions, segments, fields["key_fields"], cursor)

    def _read_source(self, x: Float[Array, "b t d"], context: Context) -> MixerOutput:
        """Returns the outputs for whole sequences."""
        if context.source is None:
            raise UserError(f"{type(self.config).__name__}(cross=True) reads a source: give the model an encoder")
        return self._read(x, context, *self._source(context.source))

    def _extend_source(
        self, x: Float[Array, "b t d"], state: SourceState, context: Context
    ) -> tuple[MixerOutput, SourceState]:
        """Returns the outputs for the next tokens, and the state after them."""
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        keys, values = _floats_as(x.dtype, (state.keys, state.values))
        fields = {"key_positions": state.positions, "key_segments": state.segments, "key_fields": state.further}
        return self._read(x, tokens, keys, values, fields), dataclasses.replace(state, cursor=cursor)

    def _source(self, source: Source) -> tuple[Any, Any, dict[str, Any]]:
        """Returns keys and values of the source's tokens, and their fields."""
        if source.hidden is None:
            raise UserError("the source of a cross mixer has no vectors: a model's encoder makes them")
        context, shape = source.context, source.hidden.shape[:2]
        positions = token_positions(context, *shape)
        _, keys, values = self._project(zero_padding(source.hidden, context), positions, context)
        further = further_fields(self.config.mask(), context)
        return keys, values, {"key_positions": positions, "key_segments": context.segments, "key_fields": further}

    def _read(self, x: jax.Array, context: Context, keys: Any, values: Any, of_keys: dict[str, Any]) -> MixerOutput:
        x = zero_padding(x, context)
        positions = token_positions(context, *x.shape[:2])
        q = self._project(x, positions, context)[0]
        fields = {"query_positions": positions, "query_segments": context.segments, **of_keys}
        if (context.segments is None) != (of_keys["key_segments"] is None):
            sides = {"query_segments": positions, "key_segments": of_keys["key_positions"]}
            fields |= {name: jnp.ones_like(at) for name, at in sides.items() if fields[name] is None}
        fields["query_fields"] = further_fields(self.config.mask(), context)
        if self.config.dropout and context.key is not None:
            share, number = self.config.dropout, of_keys["key_positions"].shape[1]
            fields["dropout"] = kept_weights(x, self.config.heads, share, context.key, number)
        return self._mix(x, q, keys, values, fields)

    def _project(self, x: Any, positions: Any, context: Context) -> tuple[Any, Any, Any]:
        """Returns queries, keys and values."""
        raise NotImplementedError

    def _mix(self, x: Any, q: Any, k: Any, v: Any, fields: dict[str, Any]) -> MixerOutput:
        """Returns the output from queries, keys, values and their fields."""
        raise NotImplementedError


def _floats_as(dtype: Any, tree: Any) -> Any:
    """Returns the tree with its floating-point arrays in this dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
