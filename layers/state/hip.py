"""HiP attention: each token finds the blocks of keys that it reads by a search through a tree over the past.

    nodes: top / block equal ranges of the blocks before the window;  until each is one block: split all in halves,
    score a half by the largest q . k over the keys of its middle block, keep the best, as many as before

Lee et al. 2024 (2406.09827), section 3.2; first tokens and a window are read beside what is found. Everything is kept:
it saves reads where neighbouring keys have similar scores. A block of queries is here those of one token and key head.

Easy to get wrong: first tokens, found blocks and window must not overlap, or a key would count twice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.configuration import UserError, at_least
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes, NewTokens, Reader, View
from recollect.layers.state.eviction import Slots, by_row
from recollect.layers.state.reads import Reads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchedSlots:
    """All tokens, and what the last search found.

    Attributes:
      found: blocks; -1 for none.
      border: the block at which the window began then.
      age: steps since then; `every` before the first.
    """

    all: Slots
    found: Int[Array, "b g n"]
    border: Int[Array, " b"]
    age: Int[Array, " b"]


@chz.chz(typecheck=True)
class HiP(CachePolicy):
    """Reads the first `sinks` tokens, the last `window` or some more, and `top` tokens between them that a tree search
    finds, every `every` tokens anew. Many tokens at once search one by one.

    Attributes:
      block: tokens that are found together.
      top: tokens that are found, a multiple of `block`.
    """

    by_token: ClassVar[bool] = True
    block: int = chz.field(default=4, validator=at_least(1))
    top: int = chz.field(default=64, validator=at_least(1))
    sinks: int = chz.field(default=4, validator=at_least(0))
    window: int = chz.field(default=32, validator=at_least(1))
    every: int = chz.field(default=1, validator=at_least(1))

    @chz.validate
    def _whole_blocks(self) -> None:
        if self.top % self.block:
            raise UserError(f"top={self.top}: must be a multiple of block={self.block}")

    def init(self, sizes: CacheSizes) -> SearchedSlots:
        b, beams = sizes.batch_size, self.top // self.block
        return SearchedSlots(
            Slots.create(sizes, sizes.max_length),
            jnp.full((b, sizes.heads, beams), -1, jnp.int32),
            jnp.zeros(b, jnp.int32),
            jnp.full(b, self.every, jnp.int32),
        )

    def step(
        self, cache: SearchedSlots, q: Float[Array, "b g r k"], new: NewTokens, read: Reader
    ) -> tuple[Float[Array, "b 1 h v"], SearchedSlots, Reads]:
        valid, number, before = new.valid[:, 0], new.number[:, 0], cache
        cache = dataclasses.replace(cache, all=cache.all.append(new), age=cache.age + 1)
        due = before.age >= self.every

        def search(cache: SearchedSlots) -> tuple[SearchedSlots, Float[Array, " b"]]:
            border = jnp.maximum(number + 1 - self.window, 0) // self.block
            found, searched = self._search(cache.all, q, border)
            fresh = dataclasses.replace(cache, found=found, border=border, age=jnp.ones_like(cache.age))
            return by_row(due, (fresh, searched), (cache, jnp.zeros_like(searched)))

        nothing = jnp.zeros(len(q), jnp.float32)
        cache, searched = jax.lax.cond(jnp.any(due), search, lambda cache: (cache, nothing), cache)
        view = self._view(cache, number)
        out, _ = read((view,))
        reads = Reads(view.keys_read() + searched, read.mass_kept((view,), (cache.all.view(),)))
        return out, by_row(valid, cache, before), reads

    def keys_read(self, length: int) -> float:
        """Returns a bound: the search reads fewer where halves are empty."""
        border = max(length - self.window, 0) // self.block
        beams, levels = self.top // self.block, self._levels(border)
        read = min(self.sinks, border * self.block) + min(self.top, border * self.block) + length - border * self.block
        return read + 2 * beams * self.block * levels / self.every

    def _levels(self, blocks: int) -> int:
        """Returns how often the ranges of `blocks` blocks are halved."""
        return math.ceil(math.log2(max(1, math.ceil(blocks / (self.top // self.block)))))

    def _search(
        self, slots: Slots, q: Float[Array, "b g r k"], border: Int[Array, " b"]
    ) -> tuple[Int[Array, "b g n"], Float[Array, " b"]]:
        """Returns the blocks before `border` that are found, and how many keys were scored, a mean over key heads."""
        (b, g, s, _), beams = slots.keys.shape, self.top // self.block
        ends = (jnp.arange(beams + 1) * border[:, None] // beams)[:, None]
        first, size = (jnp.broadcast_to(x, (b, g, beams)) for x in (ends[..., :-1], jnp.diff(ends)))
        searched = jnp.zeros(b, jnp.float32)
        for _ in range(self._levels(-(-s // self.block))):
            left = (size + 1) // 2
            first = jnp.concatenate([first, first + left], axis=-1)
            size = jnp.concatenate([left, size - left], axis=-1)
            middle = (first + size // 2)[..., None] * self.block + jnp.arange(self.block)
            keys = slots.take(jnp.clip(middle, 0, s - 1).reshape(b, g, -1)).keys.astype(q.dtype)
            scores = jnp.max(jnp.einsum("bgrk,bgnk->bgrn", q, keys), axis=2).reshape(b, g, -1, self.block)
            scores = jnp.where(size > 0, jnp.max(scores, axis=-1), -jnp.inf)
            parts = jnp.any(size > 1, axis=(1, 2))  # a search is over once all are of one block
            searched += jnp.where(parts, self.block * jnp.mean(jnp.sum(size > 0, axis=-1), axis=1), 0)
            best = jax.lax.top_k(scores, beams)[1]
            first, size = (jnp.take_along_axis(x, best, axis=-1) for x in (first, size))
        return jnp.where(size > 0, first, -1), searched

    def _view(self, cache: SearchedSlots, number: Int[Array, " b"]) -> View:
        """Returns the first tokens, those found and the window, none twice."""
        b, g, n = cache.found.shape
        start, number = (cache.border * self.block)[:, None, None], number[:, None, None]
        found = (cache.found[..., None] * self.block + jnp.arange(self.block)).reshape(b, g, n * self.block)
        sinks = jnp.broadcast_to(jnp.arange(self.sinks), (b, g, self.sinks))
        reach = self.window + self.block + self.every
        near = jnp.broadcast_to(start + jnp.arange(reach), (b, g, reach))
        searched = (found >= self.sinks) & (jnp.repeat(cache.found, self.block, axis=2) >= 0)
        slots = jnp.concatenate([sinks, found, near], axis=2).astype(jnp.int32)
        exists = jnp.concatenate([sinks < start, searched, near <= number], axis=2)
        return dataclasses.replace(cache.all.listed(slots, exists).view(), slots=slots)
