"""Recycled attention: everything is kept, and read every so many steps; in between, the keys that mattered then.

Xu et al. 2024 (Recycled Attention, 2411.05787), section 3. It saves reads, not bytes.
"""

from __future__ import annotations

import dataclasses

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.configuration import at_least, requires
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes, NewTokens, Reader, View
from recollect.layers.state.eviction import Slots, by_row
from recollect.layers.state.reads import Reads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecycledSlots:
    """All tokens, and which of them are read between full steps.

    Attributes:
      top: slots of those; -1 for none.
      mass: attention that each got when it was read last.
      age: steps since the last full one; `every` before the first.
      query: of the last full step.
    """

    all: Slots
    top: Int[Array, "b g n"]
    mass: Float[Array, "b g n"]
    age: Int[Array, " b"]
    query: Float[Array, "b g r k"] | None


@chz.chz(typecheck=True)
class Recycled(CachePolicy):
    """A full step every `every` tokens; the others read the `top` keys per key head that got most attention in it. Each
    new token takes the place of the one among them that got least when they were read last.

    Attributes:
      top: keys that are read between full steps, the newest included.
      every: tokens from one full step to the next.
      similarity: None; else a full step is taken only where queries have turned away from those of the last one: where
        the cosine between them, over all heads of the layer, is below this, compared every `every` tokens.
    """

    top: int = chz.field(default=64, validator=at_least(1))
    every: int = chz.field(default=16, validator=at_least(1))
    similarity: float | None = chz.field(default=None, validator=requires(lambda s: -1 <= s <= 1, "must be a cosine"))

    @property
    def mass_rows(self) -> int | None:
        return 1

    def init(self, sizes: CacheSizes) -> RecycledSlots:
        shape = (sizes.batch_size, sizes.heads, min(self.top, sizes.max_length))
        query = (*shape[:2], sizes.queries, sizes.key_dim)
        return RecycledSlots(
            Slots.create(sizes, sizes.max_length),
            jnp.full(shape, -1, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            jnp.full(shape[:1], self.every, jnp.int32),
            None if self.similarity is None else jnp.zeros(query, sizes.dtype),
        )

    def append(self, cache: RecycledSlots, new: NewTokens) -> RecycledSlots:
        return dataclasses.replace(cache, all=cache.all.append(new))

    def step(
        self, cache: RecycledSlots, q: Float[Array, "b g r k"], new: NewTokens, read: Reader
    ) -> tuple[Float[Array, "b 1 h v"], RecycledSlots, Reads]:
        cache = self.append(cache, new)
        due, age = cache.age >= self.every, cache.age + 1
        if cache.query is not None and self.similarity is not None:
            fresh = jnp.all(cache.query == 0, axis=(1, 2, 3))
            due, age = due & (fresh | (_cosine(q, cache.query) < self.similarity)), jnp.where(due, 1, age)

        def some(cache: RecycledSlots) -> tuple:
            least = jnp.argmin(jnp.where(cache.top < 0, -1.0, cache.mass), axis=-1)[..., None]
            top = jnp.put_along_axis(cache.top, least, new.number[:, None], axis=-1, inplace=False)
            view = cache.all.listed(top, top >= 0).view()
            out, (mass,) = read((view,))
            after = dataclasses.replace(cache, top=top, mass=mass, age=age)
            return out, after, Reads(view.keys_read(), read.mass_kept((view,), (cache.all.view(),)))

        def every(cache: RecycledSlots) -> tuple:
            view = cache.all.view()
            out, (mass,) = read((view,))
            refreshed = self._refreshed(cache, mass)
            if cache.query is not None:
                refreshed = dataclasses.replace(refreshed, query=q.astype(cache.query.dtype))
            # Rows are due at steps of their own: those that are not take what they would have got alone.
            return by_row(due, (out, refreshed, Reads(view.keys_read(), read.mass_kept((view,), (view,)))), some(cache))

        out, after, reads = jax.lax.cond(jnp.any(due), every, some, cache)
        return out, by_row(new.valid[:, 0], after, cache), reads

    def past(self, cache: RecycledSlots, new: NewTokens) -> tuple[View, ...]:
        return (cache.all.view(),)

    def prefill(
        self,
        cache: RecycledSlots,
        new: NewTokens,
        views: tuple[View, ...],
        masses: tuple[Float[Array, "b g _"], ...],
        out: Float[Array, "b t h v"],
    ) -> RecycledSlots:
        """As `CachePolicy.prefill`: the last token was a full step."""
        after = self.append(cache, new)
        rows, heads = jnp.arange(len(new.number))[:, None, None], jnp.arange(new.keys.shape[1])[:, None]
        slot = jnp.where(new.valid, new.number, cache.all.keys.shape[2])[:, None]
        after = self._refreshed(after, masses[0].at[rows, heads, slot].set(masses[1], mode="drop"))
        return by_row(jnp.any(new.valid, axis=1), after, cache)

    def keys_read(self, length: int) -> float:
        """Returns the mean over `every` steps."""
        return (length + (self.every - 1) * min(self.top, length)) / self.every

    def _refreshed(self, cache: RecycledSlots, mass: Float[Array, "b g s"]) -> RecycledSlots:
        """Returns the cache after a full step that gave each token this mass."""
        mass, top = jax.lax.top_k(jnp.where(cache.all.segments != 0, mass, -1.0), cache.top.shape[2])
        return dataclasses.replace(cache, top=jnp.where(mass < 0, -1, top), mass=mass, age=jnp.ones_like(cache.age))


def _cosine(a: Float[Array, "b g r k"], b: Float[Array, "b g r k"]) -> Float[Array, " b"]:
    a, b = (x.astype(jnp.float32).reshape(len(x), -1) for x in (a, b))
    return jnp.sum(a * b, axis=1) / jnp.maximum(jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1), 1e-30)
