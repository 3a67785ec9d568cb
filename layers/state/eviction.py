"""Cache policies that keep a fixed number of tokens and evict the least worth: a window, a window with sinks
(StreamingLLM), heavy hitters (H2O). Each is one ranking of the tokens that it could keep."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recollect.configuration import UserError, at_least
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes, NewTokens, View
from recollect.pallas_kernels.masks import Mask, Sinks, Window

_OTHER, _FREE = -1.0, -2.0
"""Ranks of tokens of documents that have ended, and of free slots: below all of the current document."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Keys and values per key head, with their fields; where all heads keep the same tokens, these have one head.

    Attributes:
      mass: attention that each key has got so far; None where the policy does not observe it.
    """

    keys: Float[Array, "b g s k"]
    values: Float[Array, "b g s v"]
    positions: Int[Array, "#b #g s"]
    segments: Int[Array, "#b #g s"]
    mass: Float[Array, "b g s"] | None = None

    @classmethod
    def create(cls, sizes: CacheSizes, slots: int, *, heads: int = 1, mass: bool = False) -> Slots:
        """Returns empty slots; fields have `heads` heads."""
        shape = (sizes.batch_size, sizes.heads, slots)
        # Arrays of their own, all of them: a state may be donated.
        positions, segments = (jnp.zeros((sizes.batch_size, heads, slots), jnp.int32) for _ in range(2))
        keys, values = (jnp.zeros((*shape, dim), sizes.dtype) for dim in (sizes.key_dim, sizes.value_dim))
        return cls(keys, values, positions, segments, jnp.zeros(shape, jnp.float32) if mass else None)

    @classmethod
    def of(cls, new: NewTokens, heads: int) -> Slots:
        """Returns new tokens as slots whose fields have `heads` heads."""
        shape = (len(new.positions), heads, new.positions.shape[1])
        return cls(new.keys, new.values, *(jnp.broadcast_to(x[:, None], shape) for x in (new.positions, new.segments)))

    def put(self, index: Int[Array, "#b #g t"], new: NewTokens) -> Slots:
        """Returns the slots with new tokens at `index`; those past the last slot are dropped."""
        b, g, s, _ = self.keys.shape
        rows, heads = jnp.arange(b)[:, None, None], jnp.arange(g)[None, :, None]
        # Each token has a place of its own, those that are dropped past the end: no write need be atomic on a GPU.
        index = jnp.where(index < s, index, s + jnp.arange(index.shape[2]))

        def write(old: jax.Array, value: jax.Array) -> jax.Array:
            at = (rows, heads[:, : old.shape[1]], index[:, : old.shape[1]])
            return old.at[at].set(value.astype(old.dtype), mode="drop", unique_indices=True)

        return Slots(
            write(self.keys, new.keys),
            write(self.values, new.values),
            write(self.positions, new.positions[:, None]),
            write(self.segments, new.segments[:, None]),
            None if self.mass is None else write(self.mass, jnp.zeros(())),
        )

    def append(self, new: NewTokens) -> Slots:
        """Returns the slots of all tokens, in order of arrival, with one more per row; padding changes nothing."""
        return self.put(jnp.where(new.valid, new.number, self.keys.shape[2])[:, None], new)

    def listed(self, index: Int[Array, "#b #g n"], exists: Bool[Array, "#b #g n"]) -> Slots:
        """Returns the slots at `index`; where one does not exist, an empty one."""
        few = self.take(jnp.clip(index, 0, self.keys.shape[2] - 1))
        return dataclasses.replace(few, segments=jnp.where(exists, few.segments, 0))

    def take(self, index: Int[Array, "#b #g n"]) -> Slots:
        """Returns the slots at `index`, whose heads the fields have too."""

        def gather(x: jax.Array) -> jax.Array:
            x = jnp.broadcast_to(x, (len(x), max(x.shape[1], index.shape[1]), *x.shape[2:]))
            at = jnp.broadcast_to(index, (*x.shape[:2], index.shape[2]))
            return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 3)), axis=2)

        return jax.tree.map(gather, self)

    def joined(self, *others: Slots) -> Slots:
        """Returns these slots and then others."""

        def join(*parts: jax.Array) -> jax.Array:
            heads = max(part.shape[1] for part in parts)
            whole = (jnp.broadcast_to(part, (len(part), heads, *part.shape[2:])) for part in parts)
            return jnp.concatenate([part.astype(parts[0].dtype) for part in whole], axis=2)

        return jax.tree.map(join, self, *others)

    def part(self, start: int, end: int | None = None) -> Slots:
        """Returns the slots from `start` on."""
        return jax.tree.map(lambda x: x[:, :, start:end], self)

    def view(self) -> View:
        """Returns the slots as keys that can be read."""
        return View(self.keys, self.values, self.positions, self.segments)


def by_row(condition: Bool[Array, " b"], yes: Any, no: Any) -> Any:
    """Returns the rows of `yes` where the condition holds, else those of `no`; trees of (b, ...)."""
    return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)


def newest_position(new: NewTokens) -> Int[Array, "b 1 1"]:
    """Returns the position of the last token of the current document, 0 where all are padding."""
    current = new.valid & (new.segments == new.documents[:, -1:])
    return jnp.max(jnp.where(current, new.positions, 0), axis=1)[:, None, None]


def ranks(slots: Slots, worth: Float[Array, "#b #g n"], new: NewTokens) -> Float[Array, "#b #g n"]:
    """Returns what slots are worth, at least 0, or less where they are free or of documents that have ended."""
    worth = jnp.where(slots.segments == new.documents[:, None, -1:], worth, _OTHER)
    return jnp.where(slots.segments == 0, _FREE, worth)


@chz.chz(typecheck=True)
class EvictionConfig(CachePolicy):
    """Base of policies that evict.

    The first `sinks` tokens of the current document have slots of their own; for the others a new token takes the slot
    of the one that ranks lowest, before it is read. Of many tokens at once, which have read whatever they saw, those
    stay that rank highest.

    Attributes:
      budget: tokens kept per key head, the newest included; each token reads all that are kept.
      sinks: first tokens of the document that are always kept.
    """

    budget: int = chz.field(default=256, validator=at_least(1))
    sinks: int = chz.field(default=0, validator=at_least(0))

    heads_differ: ClassVar[bool] = False
    """Whether key heads may keep different tokens."""

    @chz.validate
    def _room_beside_sinks(self) -> None:
        if self.sinks >= self.budget:
            raise UserError(f"sinks={self.sinks}: must be below budget={self.budget}, which they are part of")

    @abc.abstractmethod
    def rank(
        self, positions: Int[Array, "#b #g n"], mass: Float[Array, "b g n"] | None, newest: Int[Array, "b 1 1"]
    ) -> Float[Array, "#b #g n"]:
        """Returns what tokens of the current document are worth, at least 0; `newest` is the last one's position."""

    def init(self, sizes: CacheSizes) -> Slots:
        slots = max(min(self.budget, sizes.max_length), self.sinks + 1)
        return Slots.create(
            sizes, slots, heads=sizes.heads if self.heads_differ else 1, mass=self.mass_rows is not None
        )

    def capacity(self, sizes: CacheSizes) -> int | None:
        return sizes.max_length if sizes.max_length < self.budget else None

    def append(self, cache: Slots, new: NewTokens) -> Slots:
        others = cache.part(self.sinks)
        slot = jnp.argmin(self._ranks(others, new), axis=-1)[..., None] + self.sinks
        first = new.positions[:, None] < self.sinks
        slot = jnp.where(first, new.positions[:, None], slot)
        return cache.put(jnp.where(new.valid[:, None], slot, cache.keys.shape[2]), new)

    def select(self, cache: Slots, q: Float[Array, "b g r k"], new: NewTokens) -> tuple[View, ...]:
        return (cache.view(),)

    def observe(self, cache: Slots, views: tuple[View, ...], masses: tuple[Float[Array, "b g _"], ...]) -> Slots:
        if cache.mass is None:
            return cache
        (mass,) = masses
        return dataclasses.replace(cache, mass=cache.mass + mass)

    def past(self, cache: Slots, new: NewTokens) -> tuple[View, ...]:
        return (dataclasses.replace(cache.view(), mask=self.mask()),)

    def among(self, new: NewTokens) -> tuple[View, ...]:
        return (dataclasses.replace(new.view(), mask=self.mask()),)

    def prefill(
        self,
        cache: Slots,
        new: NewTokens,
        views: tuple[View, ...],
        masses: tuple[Float[Array, "b g _"], ...],
        out: Float[Array, "b t h v"],
    ) -> Slots:
        chunk = Slots.of(new, cache.positions.shape[1])
        if cache.mass is not None:
            cache = dataclasses.replace(cache, mass=cache.mass + masses[0])
            chunk = dataclasses.replace(chunk, mass=masses[1])
        kept = cache.part(0, self.sinks)
        if self.sinks:
            early = new.valid & (new.positions < self.sinks)
            first = early & (new.segments == new.documents[:, -1:])
            kept = kept.put(jnp.where(first, new.positions, self.sinks)[:, None], new)
            chunk = dataclasses.replace(chunk, segments=jnp.where(early[:, None], 0, chunk.segments))
        candidates = cache.part(self.sinks).joined(chunk)
        best = jax.lax.top_k(self._ranks(candidates, new), cache.keys.shape[2] - self.sinks)[1]
        return kept.joined(candidates.take(best))

    def mask(self) -> Mask | None:
        """Returns what hides keys from each of many tokens as if they had come one by one, where a mask can say it."""
        return None

    def keys_read(self, length: int) -> float:
        return float(min(self.budget, length))

    def _ranks(self, slots: Slots, new: NewTokens) -> Float[Array, "#b #g n"]:
        return ranks(slots, self.rank(slots.positions, slots.mass, newest_position(new)), new)


@chz.chz(typecheck=True)
class RecentTokens(EvictionConfig):
    """The newest tokens of the document, and its first ones where there are `sinks`: a sliding window, on a model that
    was trained without one."""

    def rank(
        self, positions: Int[Array, "#b #g n"], mass: Float[Array, "b g n"] | None, newest: Int[Array, "b 1 1"]
    ) -> Float[Array, "#b #g n"]:
        return positions.astype(jnp.float32)

    def mask(self) -> Mask | None:
        near = Window(self.budget - self.sinks)
        return near | Sinks(self.sinks) if self.sinks else near


@chz.chz(typecheck=True)
class StreamingLLM(RecentTokens):
    """The first tokens and the newest (Xiao et al. 2023, 2309.17453, section 3.2).

    Attributes:
      count: "cache": positions are those within the cache, as published, so that no distance is above `budget`;
        "document": as the model was trained.
    """

    sinks: int = chz.field(default=4, validator=at_least(0))
    count: Literal["cache", "document"] = "cache"

    def select(self, cache: Slots, q: Float[Array, "b g r k"], new: NewTokens) -> tuple[View, ...]:
        return self.past(cache, new)

    def past(self, cache: Slots, new: NewTokens) -> tuple[View, ...]:
        return self._parts(cache.part(0, self.sinks).view(), cache.part(self.sinks).view(), new)

    def among(self, new: NewTokens) -> tuple[View, ...]:
        return self._parts(new.view(), new.view(), new)

    def _parts(self, first: View, others: View, new: NewTokens) -> tuple[View, ...]:
        """Returns views of the first tokens and of the others. Only distances count, so those between others stay, and
        a query moves, as the first ones see it, to its place in the cache."""
        near = Window(self.budget - self.sinks)
        others = dataclasses.replace(others, mask=near & ~Sinks(self.sinks) if self.sinks else near)
        if not self.sinks:
            return (others,)
        at = (
            new.positions[:, None] if self.count == "document" else jnp.minimum(new.positions, self.budget - 1)[:, None]
        )
        return (dataclasses.replace(first, mask=Sinks(self.sinks), query_positions=at), others)


@chz.chz(typecheck=True)
class HeavyHitters(EvictionConfig):
    """The tokens that got most attention so far, summed over queries and the query heads of a key head, and the newest
    (Zhang et al. 2023, H2O, 2306.14048, algorithm 1).

    Attributes:
      recent: of the budget, for the newest tokens; None: half of what is left beside the sinks.
    """

    heads_differ: ClassVar[bool] = True
    recent: int | None = chz.field(default=None, validator=at_least(1))

    @chz.validate
    def _room_beside_recent(self) -> None:
        if self.recent is not None and self.recent + self.sinks > self.budget:
            raise UserError(f"recent={self.recent}: with sinks={self.sinks} more than budget={self.budget}")

    @property
    def mass_rows(self) -> int | None:
        return 0

    def rank(
        self, positions: Int[Array, "#b #g n"], mass: Float[Array, "b g n"] | None, newest: Int[Array, "b 1 1"]
    ) -> Float[Array, "#b #g n"]:
        assert mass is not None
        recent = max(1, (self.budget - self.sinks) // 2) if self.recent is None else self.recent
        return jnp.where(newest - positions < recent, jnp.inf, mass)
