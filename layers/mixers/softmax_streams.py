"""How mixers of the softmax family stream: new tokens are written to a cache, then read from it with the others.

`Mixer.extend` in a file of its own, since a cache and a source are read alike: by keys and values with their fields.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from recollect.configuration import UserError
from recollect.layers.context import Context
from recollect.layers.mixer import MixerOutput, zero_padding
from recollect.layers.mixers.cross_attention import CrossReader
from recollect.layers.modules import masking
from recollect.layers.state.capacity import check_positions
from recollect.layers.state.reads import Reads, cache_reads, report


class SoftmaxStreams(CrossReader):
    """Base of softmax mixers: what they do with streams."""

    def extend(self, x: Float[Array, "b t d"], state: Any, context: Context = Context()) -> tuple[MixerOutput, Any]:
        if self.config.cross:
            return self._extend_source(x, state, context)
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        check_positions(state.cursor, tokens, self.config.traits.maximum_length)
        x = zero_padding(x, tokens)
        q, k, v = self._project(x, tokens.positions, tokens)
        keys, values, slots, state = state.remember(k, v, tokens, cursor)
        fields: dict[str, Any] = {"query_positions": tokens.positions, "query_segments": tokens.segments}
        fields |= {"key_positions": slots.positions, "key_segments": slots.segments}
        if state.further:
            fields |= {"query_fields": masking.given(state.further, tokens), "key_fields": state.further}
        report(lambda: self._reads(x, q, keys, values, fields))
        return self._mix(x, q, keys, values, fields), state

    def _reads(self, x: jax.Array, q: jax.Array, k: Any, v: Any, fields: dict[str, Any]) -> Reads:
        """Returns what tokens read that are streamed; arguments are those of `_mix`. Here the cache is read whole."""
        return cache_reads(fields["key_segments"])

    def _refuse_stream(self) -> None:
        """Raises UserError where a stream cannot start from `init_state`."""
        how = "starts its streams with init_cross_state" if self.config.cross else "sees later tokens: it has no stream"
        raise UserError(f"{type(self.config).__name__}: cross={self.config.cross}, causal={self.config.causal} {how}")
