"""Fuzzy recall (MAD): in-context recall of keys and values of one or several tokens.

    tokens   . . a b x   c y z   a b x   a w   c y        (dots are padding; a b and a are different keys)
    label                            x         y z

No token comes twice within a key or a value. The last key was there before; models train on every next token and are
scored on values of keys that were there before.

Source: MAD (arXiv 2403.17844), fuzzy in-context recall; athms/mad-lab evaluates on the longest keys alone
(`FuzzySlice.shortest`), and draws the last key before the others, here it is one of theirs.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.in_context_recall import RecalledTokens
from recollect.data.synthetics.task import Slice


@chz.chz(typecheck=True)
class FuzzySlice(Slice):
    """Examples of one length, with keys of `shortest` tokens or more."""

    shortest: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class FuzzyRecall(RecalledTokens):
    """Values, of several tokens, of keys of several tokens.

    Attributes:
      vocab_size: token ids: half of all but the last are keys', then come values', then padding.
      key_tokens, value_tokens: most tokens of a key and of a value; fewer are as likely.
    """

    vocab_size: int = 16
    length: int = 128
    key_tokens: int = chz.field(default=3, validator=at_least(1))
    value_tokens: int = chz.field(default=3, validator=at_least(1))

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    @property
    def _keys(self) -> int:
        return (self.vocab_size - 1) // 2

    def slice(self) -> FuzzySlice:
        return FuzzySlice(length=self.length, shortest=1)

    def check(self, slice: FuzzySlice) -> None:
        size = self.key_tokens + self.value_tokens
        if slice.shortest > self.key_tokens:
            raise UserError(f"shortest={slice.shortest}: must be at most key_tokens={self.key_tokens}")
        if slice.length < (needed := 2 * size - 1):
            raise UserError(f"length={slice.length}: a pair and its repetition need up to {needed} tokens")
        if self.vocab_size < (needed := 1 + 2 * max(self.key_tokens, self.value_tokens, 2)):
            raise UserError(f"vocab_size={self.vocab_size}: keys and values of different tokens need {needed}")
        if (self._keys + 1) ** self.key_tokens >= 2**31:
            raise UserError(f"key_tokens={self.key_tokens}: {self._keys} ** key_tokens keys must be below 2**31")

    def chance(self, slice: FuzzySlice) -> float:
        return 1 / (self.vocab_size - 1 - self._keys)

    def sample(self, key: Key[Array, ""], slice: FuzzySlice, batch_size: int) -> Batch:
        """Returns a batch in which every position has a target."""
        b, most_key, most_value, room = batch_size, self.key_tokens, self.value_tokens, slice.length + 1
        size, keys = most_key + most_value, self._keys
        slots = (room - size) // (slice.shortest + 1)  # as many as the shortest would fill
        of_keys, of_key_sizes, of_values, of_value_sizes, of_last = jax.random.split(key, 5)

        def motifs(key: Key[Array, ""], tokens: int, most: int) -> Array:
            return distinct(key, b * slots, tokens, most).reshape(b, slots, most)

        key_motifs = motifs(of_keys, keys, most_key)
        value_motifs = keys + motifs(of_values, self.vocab_size - 1 - keys, most_value)
        key_sizes = jax.random.randint(of_key_sizes, (b, slots), slice.shortest, most_key + 1, jnp.int32)
        value_sizes = jax.random.randint(of_value_sizes, (b, slots), 1, most_value + 1, jnp.int32)
        digits = jnp.where(jnp.arange(most_key) < key_sizes[:, :, None], key_motifs + 1, 0)
        codes = jnp.sum(digits * (keys + 1) ** jnp.arange(most_key), axis=2)
        # A slot has the value of the first slot with its key.
        source = jnp.argmax(codes[:, :, None] == codes[:, None, :], axis=2)
        value_sizes = jnp.take_along_axis(value_sizes, source, axis=1)
        kept = jnp.cumsum(key_sizes + value_sizes, axis=1) <= room - size
        last = jnp.argmax(jnp.where(kept, jax.random.uniform(of_last, (b, slots)), -1.0), axis=1)[:, None]
        numbers = jnp.broadcast_to(jnp.arange(slots), (b, slots))
        again = jnp.pad(source < numbers, ((0, 0), (0, 1)), constant_values=True)
        kept = jnp.pad(kept, ((0, 0), (0, 1)), constant_values=True)
        slot = jnp.concatenate([numbers, last], axis=1)
        source = jnp.take_along_axis(source, slot, axis=1)
        key_sizes, value_sizes = (jnp.take_along_axis(sizes, slot, axis=1) for sizes in (key_sizes, value_sizes))
        widths = jnp.where(kept, key_sizes + value_sizes, 0)
        starts = (room - jnp.sum(widths, axis=1, keepdims=True) + jnp.cumsum(widths, axis=1) - widths)[:, :, None]
        tokens = [
            jnp.take_along_axis(part, index[:, :, None], axis=1)
            for part, index in ((key_motifs, slot), (value_motifs, source))
        ]
        in_key, in_value = jnp.arange(most_key), jnp.arange(most_value)
        key_places = jnp.where(in_key < key_sizes[:, :, None], starts + in_key, room)
        value_starts = starts + key_sizes[:, :, None]
        value_places = jnp.where(in_value < value_sizes[:, :, None], value_starts + in_value, room)
        places = jnp.concatenate([key_places, value_places], axis=2)
        places = jnp.where(kept[:, :, None], places, room)  # nothing is written beyond the end
        rows = jnp.arange(b)[:, None, None]
        sequence = jnp.full((b, room), self.vocab_size - 1, jnp.int32)
        sequence = sequence.at[rows, places].set(jnp.concatenate(tokens, axis=2), mode="drop")
        is_value = jnp.broadcast_to(jnp.arange(size) >= most_key, places.shape)
        recalled = jnp.zeros((b, room), bool).at[rows, places].set(again[:, :, None] & is_value, mode="drop")
        return self.batch(sequence, recalled)
