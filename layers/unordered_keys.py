"""Linear attention to keys without an order: all of the token's document, or of a source.

The sum of keys times values is the same for every query of a document. A stream beside a source holds these sums, made
once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.configuration import UserError
from recollect.layers.context import Context, Source
from recollect.layers.mixer import Cursor, MixerConfig, MixerOutput, Traits, check_input, zero_padding
from recollect.layers.recurrent import RecurrentMixer
from recollect.pallas_kernels import segments as packed_rows
from recollect.pallas_kernels.linear_recurrence.all_keys import read_all_keys
from recollect.pallas_kernels.segments import document_numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceSums:
    """The sums, fp32, the segment of each, 0 where a row has fewer documents, and where the stream stands."""

    sums: Float[Array, "b n h k v"]
    segments: Int[Array, "b n"]
    cursor: Cursor

    @classmethod
    def of(
        cls, k: Float[Array, "b s h k"], v: Float[Array, "b s h v"], segments: Int[Array, "b s"] | None
    ) -> SourceSums:
        """Returns the sums over a source, as many as the row with most documents needs. Inside jit their number is not
        known: there is one, and rows with more documents read NaN."""
        b, s = k.shape[:2]
        segments = jnp.ones((b, s), jnp.int32) if segments is None else segments
        numbers = document_numbers(segments)
        n = 1 if isinstance(numbers, jax.core.Tracer) else int(jnp.max(numbers)) + 1
        of_document = (numbers[..., None] == jnp.arange(n)) & (segments != 0)[..., None]
        k, v = (packed_rows.zero_padding(x, segments).astype(jnp.float32) for x in (k, v))
        sums = jnp.einsum("bsn,bshk,bshv->bnhkv", of_document.astype(jnp.float32), k, v)
        sums = jnp.where((jnp.max(numbers, axis=1) < n)[:, None, None, None, None], sums, jnp.nan)
        return cls(sums, jnp.max(jnp.where(of_document, segments[..., None], 0), axis=1), Cursor.start(b))

    def read(self, q: Float[Array, "b t h k"], segments: Int[Array, "b t"]) -> Float[Array, "b t h v"]:
        """Returns what queries read of the sum of their own segment, fp32."""
        o = jnp.einsum("bthk,bnhkv->btnhv", q.astype(jnp.float32), self.sums)
        same = (segments[..., None] == self.segments[:, None]) & (segments != 0)[..., None]
        return jnp.sum(jnp.where(same[..., None, None], o, 0), axis=2)


@chz.chz(typecheck=True)
class UnorderedKeysConfig(MixerConfig):
    """Base of the configs.

    Attributes:
      causal: False: each token reads all keys of its document.
      cross: queries read the keys of a source.
    """

    causal: bool = True
    cross: bool = False

    @property
    def in_order(self) -> bool:
        """Whether a query reads the keys up to its own."""
        return self.causal and not self.cross

    @property
    def traits(self) -> Traits:
        if self.causal or self.cross:
            return Traits(cross=self.cross)
        return Traits(causal=False, streams=False, symmetry="permutation")


class UnorderedKeysReader(RecurrentMixer):
    """Base of mixers on a recurrence that neither decays nor erases: what they do where `config.in_order` is False."""

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        if self.config.in_order:
            return super().__call__(x, context)
        check_input(x, self.width)
        source = context.source if self.config.cross else Source(x, context)
        if source is None or source.hidden is None:
            raise UserError(f"{type(self.config).__name__}(cross=True) reads a source: give the model an encoder")
        x = zero_padding(x, context)
        o = read_all_keys(
            self.queries(x, context),
            *self.keys_and_values(zero_padding(source.hidden, source.context), source.context),
            segment_ids=context.segments,
            key_segment_ids=source.context.segments,
            chunk_size=self.config.chunk,
        )
        return MixerOutput(self.outputs(o, x))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> Any:
        name = type(self.config).__name__
        if self.config.cross:
            raise UserError(f"{name}(cross=True) reads a source: streams start from its vectors")
        if not self.config.causal:
            raise UserError(f"{name}(causal=False) reads later tokens, so it cannot stream or generate")
        return super().init_state(batch_size, max_length, dtype)

    def init_cross_state(self, source: Source, dtype: Any = jnp.float32) -> SourceSums:
        """Returns the sums over the source, fp32."""
        assert source.hidden is not None
        hidden = zero_padding(source.hidden, source.context)
        return SourceSums.of(*self.keys_and_values(hidden, source.context), source.context.segments)

    def extend(self, x: Float[Array, "b t d"], state: Any, context: Context = Context()) -> tuple[MixerOutput, Any]:
        if not self.config.cross:
            return super().extend(x, state, context)
        check_input(x, self.width)
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        assert tokens.segments is not None
        x = zero_padding(x, tokens)
        o = state.read(self.queries(x, tokens), tokens.segments)
        return MixerOutput(self.outputs(o, x)), dataclasses.replace(state, cursor=cursor)

    def queries(self, x: Float[Array, "b t d"], context: Context) -> Float[Array, "b t h k"]:
        """Returns queries as the recurrence takes them."""
        raise NotImplementedError

    def keys_and_values(
        self, x: Float[Array, "b s d"], context: Context
    ) -> tuple[Float[Array, "b s h k"], Float[Array, "b s h v"]]:
        """Returns keys and values as the recurrence takes them."""
        raise NotImplementedError

    def outputs(self, o: Float[Array, "b t h v"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the mixer's output from what the recurrence reads."""
        raise NotImplementedError
