"""Task-KV, a reconstruction: key heads whose outputs lie far from the mean of the layer's keep every token, the others
first tokens, newest tokens, and those between them that matter.

    u_h = mean of head h's output over the last w tokens of the prompt, over its norm;   d_h = |u_h - mean_h' u_h'|
    a key head has the largest d of its query heads;  the `share` of key heads with the largest d are full

Task-KV (2501.15113). Only its abstract was read, and no published code was found. The abstract states the split by
distance from the "semantic centre", made for each input, and what the other heads keep. How outputs are averaged and
compared, how tokens in the middle are weighed (by the attention of the last w tokens, as in SnapKV) and all sizes are
choices of this file.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from recollect.configuration import UserError, at_least, requires
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes, NewTokens, View
from recollect.layers.state.eviction import Slots, by_row, newest_position, ranks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitSlots:
    """Slots of the heads that keep everything, and of the others.

    Attributes:
      order: key heads, those of `full` first.
    """

    full: Slots
    small: Slots
    order: Int[Array, "b g"]


@chz.chz(typecheck=True)
class TaskKV(CachePolicy):
    """All tokens for the key heads whose outputs at the end of a prompt (the tokens of one call) are far from the mean
    of all heads', `budget` tokens for the others. Before a prompt the first key heads keep everything.

    Attributes:
      share: of the key heads, that keep everything; at least one does, and one does not.
      budget: tokens that each of the others keeps: `sinks` first ones, `recent` newest ones, and between them those
        that got most attention from the prompt's last tokens.
      window: last tokens of the prompt whose outputs and attention count.
    """

    whole_prompts: ClassVar[bool] = True
    share: float = chz.field(default=0.25, validator=requires(lambda share: 0 < share < 1, "must be between 0 and 1"))
    budget: int = chz.field(default=256, validator=at_least(1))
    sinks: int = chz.field(default=4, validator=at_least(0))
    recent: int = chz.field(default=128, validator=at_least(1))
    window: int = chz.field(default=32, validator=at_least(1))

    @chz.validate
    def _room_in_the_middle(self) -> None:
        if self.sinks + self.recent > self.budget:
            raise UserError(f"budget={self.budget}: must hold sinks={self.sinks} and recent={self.recent}")

    @property
    def mass_rows(self) -> int | None:
        return self.window

    def full_heads(self, heads: int) -> int:
        """Returns how many key heads keep everything."""
        return min(max(1, round(self.share * heads)), heads - 1)

    def init(self, sizes: CacheSizes) -> SplitSlots:
        if sizes.heads < 2:
            raise UserError("TaskKV divides the key heads of a layer, and this one has one: heads, key_heads")
        full, small = (
            dataclasses.replace(sizes, heads=heads)
            for heads in (self.full_heads(sizes.heads), sizes.heads - self.full_heads(sizes.heads))
        )
        return SplitSlots(
            Slots.create(full, sizes.max_length, heads=full.heads),
            Slots.create(small, min(self.budget, sizes.max_length), heads=small.heads, mass=True),
            jnp.tile(jnp.arange(sizes.heads, dtype=jnp.int32), (sizes.batch_size, 1)),
        )

    def append(self, cache: SplitSlots, new: NewTokens) -> SplitSlots:
        def put(slots: Slots, heads: Int[Array, "b n"], worth: Float[Array, "b n s"]) -> Slots:
            slot = jnp.argmin(ranks(slots, worth, new), axis=-1)[..., None]
            of_heads = dataclasses.replace(new, keys=_heads(new.keys, heads), values=_heads(new.values, heads))
            return slots.put(jnp.where(new.valid[:, None], slot, slots.keys.shape[2]), of_heads)

        number = cache.full.keys.shape[1]
        return SplitSlots(
            put(cache.full, cache.order[:, :number], _age(cache.full)),
            put(cache.small, cache.order[:, number:], self._worth(cache.small, new)),
            cache.order,
        )

    def select(self, cache: SplitSlots, q: Float[Array, "b g r k"], new: NewTokens) -> tuple[View, ...]:
        return self.past(cache, new)

    def past(self, cache: SplitSlots, new: NewTokens) -> tuple[View, ...]:
        return tuple(slots.view() for slots in _by_head(cache))

    def prefill(
        self,
        cache: SplitSlots,
        new: NewTokens,
        views: tuple[View, ...],
        masses: tuple[Float[Array, "b g _"], ...],
        out: Float[Array, "b t h v"],
    ) -> SplitSlots:
        number, heads = cache.full.keys.shape[1], cache.order.shape[1]
        order = jnp.argsort(-self._distances(out, new.valid, heads), axis=1).astype(jnp.int32)
        full, small = _by_head(cache)
        tokens = full.joined(dataclasses.replace(small, mass=None), Slots.of(new, heads))
        tokens = dataclasses.replace(tokens, mass=jnp.concatenate(masses, axis=2))
        of_full, of_small = (
            jax.tree.map(lambda x, some=some: _heads(x, some), tokens)
            for some in (order[:, :number], order[:, number:])
        )
        after = SplitSlots(
            dataclasses.replace(_best(of_full, _age(of_full), new, cache.full), mass=None),
            _best(of_small, self._worth(of_small, new), new, cache.small),
            order,
        )
        return by_row(jnp.any(new.valid, axis=1), after, cache)  # a row of padding alone keeps what it has

    def keys_read(self, length: int) -> float:
        """Returns the mean over heads where `share` of them is a whole number."""
        return self.share * length + (1 - self.share) * min(self.budget, length)

    def _worth(self, slots: Slots, new: NewTokens) -> Float[Array, "b g n"]:
        assert slots.mass is not None
        near = newest_position(new) - slots.positions < self.recent
        return jnp.where(near | (slots.positions < self.sinks), jnp.inf, slots.mass)

    def _distances(self, out: Float[Array, "b t h v"], valid: Bool[Array, "b t"], heads: int) -> Float[Array, "b g"]:
        """Returns how far the outputs of each key head are from the mean of all heads'."""
        last = valid & (jnp.cumsum(valid[:, ::-1], axis=1)[:, ::-1] <= self.window)
        mean = jnp.sum(jnp.where(last[..., None, None], out.astype(jnp.float32), 0), axis=1)  # its length cancels
        unit = mean / jnp.maximum(jnp.linalg.norm(mean, axis=2, keepdims=True), 1e-30)
        distance = jnp.linalg.norm(unit - jnp.mean(unit, axis=1, keepdims=True), axis=2)
        return jnp.max(distance.reshape(len(out), heads, -1), axis=2)


def _age(slots: Slots) -> Float[Array, "b g n"]:
    return slots.positions.astype(jnp.float32)


def _best(tokens: Slots, worth: Float[Array, "b g n"], new: NewTokens, room: Slots) -> Slots:
    """Returns the tokens that rank highest, as many as there is room for."""
    return tokens.take(jax.lax.top_k(ranks(tokens, worth, new), room.keys.shape[2])[1])


def _heads(x: Shaped[Array, "b g ..."], index: Int[Array, "b n"]) -> Shaped[Array, "b n ..."]:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _by_head(cache: SplitSlots) -> tuple[Slots, Slots]:
    """Returns both kinds of slots with all key heads, in the layer's order; those of heads of the other kind are
    empty."""
    number, place = cache.full.keys.shape[1], jnp.argsort(cache.order, axis=1)

    def spread(slots: Slots, place: Int[Array, "b g"]) -> Slots:
        exists = (place >= 0) & (place < slots.keys.shape[1])
        every = jax.tree.map(lambda x: _heads(x, jnp.clip(place, 0, slots.keys.shape[1] - 1)), slots)
        return dataclasses.replace(every, segments=jnp.where(exists[..., None], every.segments, 0))

    return spread(cache.full, place), spread(cache.small, place - number)
