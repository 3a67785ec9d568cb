"""LongHeads: each head reads the chunks of the past that fit its query best, at positions that were seen in training.

    r_c = attention of m_c over the keys of chunk c, which are values too;   m_c = mean output of attention within c
    read: chunk 0, the last two, and those of the largest q . r_c;   the j-th of them at positions j l ... j l + l - 1

Lu et al. 2024 (2402.10685), section 3, without training. Everything is kept, keys before rotation; it saves reads. A
chunk key is here the mean over the query heads of a key head, which choose together by the largest of their scores.

Easy to get wrong: r_c is of keys and queries rotated within the chunk; the query it is scored against is not rotated.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.configuration import at_least
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes, NewTokens, Reader, View
from recollect.layers.state.eviction import Slots, by_row
from recollect.layers.state.reads import Reads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedSlots:
    """All tokens, in chunks of `l` in order of arrival.

    Attributes:
      chunk_keys: r_c of each complete chunk.
      queries: of the tokens of the chunk that is not complete.
    """

    all: Slots
    chunk_keys: Float[Array, "b g n k"]
    queries: Float[Array, "b g l r k"]


@chz.chz(typecheck=True)
class LongHeads(CachePolicy):
    """Reads `top` chunks of `chunk` tokens per key head; top * chunk should be at most the length of training. Many
    tokens at once choose one by one, as published.

    Attributes:
      chunk: tokens of a chunk (256 in the paper).
      top: chunks that a token reads: the first, the last two, and those that fit best (16 in the paper).
    """

    unrotated: ClassVar[bool] = True
    by_token: ClassVar[bool] = True
    chunk: int = chz.field(default=16, validator=at_least(1))
    top: int = chz.field(default=4, validator=at_least(3))

    def init(self, sizes: CacheSizes) -> ChunkedSlots:
        shape = (sizes.batch_size, sizes.heads)
        return ChunkedSlots(
            Slots.create(sizes, sizes.max_length),
            jnp.zeros((*shape, -(-sizes.max_length // self.chunk), sizes.key_dim), sizes.dtype),
            jnp.zeros((*shape, self.chunk, sizes.queries, sizes.key_dim), sizes.dtype),
        )

    def step(
        self, cache: ChunkedSlots, q: Float[Array, "b g r k"], new: NewTokens, read: Reader
    ) -> tuple[Float[Array, "b 1 h v"], ChunkedSlots, Reads]:
        b, number, valid = len(q), new.number[:, 0], new.valid[:, 0]
        at = jnp.where(valid, number % self.chunk, self.chunk)
        queries = cache.queries.at[jnp.arange(b), :, at].set(q.astype(cache.queries.dtype), mode="drop")
        cache = ChunkedSlots(cache.all.append(new), cache.chunk_keys, queries)
        view = self._chosen(cache, q, number)
        out, _ = read((view,))
        complete = at == self.chunk - 1

        def with_key(cache: ChunkedSlots) -> ChunkedSlots:
            place = number // self.chunk
            key = self._chunk_key(cache, place, read)
            keys = cache.chunk_keys.at[jnp.arange(b), :, place].set(key.astype(cache.chunk_keys.dtype), mode="drop")
            return dataclasses.replace(cache, chunk_keys=by_row(complete, keys, cache.chunk_keys))

        cache = jax.lax.cond(jnp.any(complete), with_key, lambda cache: cache, cache)
        assert view.slots is not None
        chosen, every = (
            dataclasses.replace(slots.view(), unrotated=True)
            for slots in (cache.all.listed(view.slots, view.segments != 0), cache.all)
        )
        return out, cache, Reads(view.keys_read() + number // self.chunk, read.mass_kept((chosen,), (every,)))

    def keys_read(self, length: int) -> float:
        """Returns the tokens of the chosen chunks, and the keys of complete ones, which are read to choose."""
        last, complete = (length - 1) % self.chunk + 1, (length - 1) // self.chunk
        return float(min(self.top - 1, complete) * self.chunk + last + complete)

    def _chosen(self, cache: ChunkedSlots, q: Float[Array, "b g r k"], number: Int[Array, " b"]) -> View:
        """Returns the chunks that the token in slot `number` reads, in order, at positions one after another."""
        n, size, current = cache.chunk_keys.shape[2], self.chunk, (number // self.chunk)[:, None, None]
        scores = jnp.max(jnp.einsum("bgrk,bgnk->bgrn", q, cache.chunk_keys.astype(q.dtype)), axis=2)
        index = jnp.arange(n, dtype=jnp.int32)
        always = (index == 0) | (index >= current - 1)
        scores = jnp.where(index <= current, jnp.where(always, jnp.inf, scores), -jnp.inf)
        best, chunks = jax.lax.top_k(scores, min(self.top, n))
        chunks = jnp.sort(jnp.where(best > -jnp.inf, chunks, n), axis=-1)[..., None]
        slots = (chunks * size + jnp.arange(size)).reshape(*chunks.shape[:2], -1)
        read = cache.all.listed(slots, slots <= number[:, None, None])
        last = jnp.sum(chunks[..., 0] < n, axis=-1, keepdims=True, dtype=jnp.int32) - 1
        return View(
            read.keys,
            read.values,
            jnp.broadcast_to(jnp.arange(slots.shape[2], dtype=jnp.int32), slots.shape),
            read.segments,
            query_positions=(last * size + (number % size)[:, None, None]),
            slots=slots,
            unrotated=True,
        )

    def _chunk_key(self, cache: ChunkedSlots, place: Int[Array, " b"], read: Reader) -> Float[Array, "b g k"]:
        """Returns the key of the chunk whose last token has just come."""
        slots = place[:, None, None] * self.chunk + jnp.arange(self.chunk)
        tokens = cache.all.take(jnp.minimum(slots, cache.all.keys.shape[2] - 1))
        within = jnp.arange(self.chunk, dtype=jnp.int32)
        keys = read.rotate(tokens.keys[..., None, :], within)[..., 0, :].astype(jnp.float32)
        queries = read.rotate(cache.queries, within).astype(jnp.float32)
        scale = keys.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.einsum("bgtrk,bgsk->bgrts", queries, keys) * scale, axis=-1)
        mean = jnp.mean(jnp.einsum("bgrts,bgsv->bgrtv", weights, tokens.values.astype(jnp.float32)), axis=3)
        weights = jax.nn.softmax(jnp.einsum("bgrk,bgsk->bgrs", mean, keys) * scale, axis=-1)
        return jnp.mean(jnp.einsum("bgrs,bgsk->bgrk", weights, keys), axis=2)
