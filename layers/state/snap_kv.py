"""Cache policies that compress a prompt once, by what its last queries look at: SnapKV, and PyramidKV, whose lower
layers get more of the room."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least, requires
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes, NewTokens, View
from recollect.layers.state.eviction import Slots, by_row, newest_position, ranks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptSlots:
    """What stays of a prompt, per key head, and the newest of the tokens after it."""

    prompt: Slots
    recent: Slots


@chz.chz(typecheck=True)
class SnapKV(CachePolicy):
    """Of a prompt (the tokens of one call), per key head, its last `window` tokens and those that got most attention
    from them (Li et al. 2024, 2404.14469, section 4). Tokens that come one by one have `recent` slots of their own, in
    which the oldest makes room; published, they are all kept.

    Attributes:
      budget: tokens of the prompt that stay, its last ones included.
      window: queries at the end of the prompt whose attention counts.
      kernel: keys over which attention is pooled by its maximum, so that the neighbours of a key stay with it; odd.
      recent: slots for the tokens after the prompt.
    """

    whole_prompts: ClassVar[bool] = True
    budget: int = chz.field(default=256, validator=at_least(1))
    window: int = chz.field(default=32, validator=at_least(1))
    kernel: int = chz.field(default=7, validator=requires(lambda n: n > 0 and n % 2, "must be odd"))
    recent: int = chz.field(default=256, validator=at_least(1))

    @chz.validate
    def _room_beside_window(self) -> None:
        if self.window > self.budget:
            raise UserError(f"window={self.window}: must be at most budget={self.budget}, which it is part of")

    @property
    def mass_rows(self) -> int | None:
        return self.window

    def budget_of(self, sizes: CacheSizes) -> int:
        """Returns the budget of a layer."""
        return self.budget

    def init(self, sizes: CacheSizes) -> PromptSlots:
        prompt = Slots.create(sizes, min(self.budget_of(sizes), sizes.max_length), heads=sizes.heads)
        return PromptSlots(prompt, Slots.create(sizes, min(self.recent, sizes.max_length)))

    def capacity(self, sizes: CacheSizes) -> None:
        """None: old tokens make room."""

    def append(self, cache: PromptSlots, new: NewTokens) -> PromptSlots:
        order = ranks(cache.recent, cache.recent.positions.astype(jnp.float32), new)
        slot = jnp.where(new.valid[:, None], jnp.argmin(order, axis=-1)[..., None], order.shape[-1])
        return dataclasses.replace(cache, recent=cache.recent.put(slot, new))

    def select(self, cache: PromptSlots, q: Float[Array, "b g r k"], new: NewTokens) -> tuple[View, ...]:
        return self.past(cache, new)

    def past(self, cache: PromptSlots, new: NewTokens) -> tuple[View, ...]:
        return (cache.prompt.view(), cache.recent.view())

    def prefill(
        self,
        cache: PromptSlots,
        new: NewTokens,
        views: tuple[View, ...],
        masses: tuple[Float[Array, "b g _"], ...],
        out: Float[Array, "b t h v"],
    ) -> PromptSlots:
        heads = new.keys.shape[1]
        candidates = cache.prompt.joined(cache.recent, Slots.of(new, heads))
        mass = jnp.concatenate([*masses[:2], self._pooled(masses[2])], axis=2)
        worth = jnp.where(newest_position(new) - candidates.positions < self.window, jnp.inf, mass)
        best = jax.lax.top_k(ranks(candidates, worth, new), cache.prompt.keys.shape[2])[1]
        emptied = dataclasses.replace(cache.recent, segments=jnp.zeros_like(cache.recent.segments))
        after = PromptSlots(candidates.take(best), emptied)
        some = jnp.any(new.valid, axis=1)  # a row of padding alone keeps what it has
        return by_row(some, after, cache)

    def keys_read(self, length: int) -> float:
        """Returns the keys that the first token after a prompt of length - 1 tokens reads."""
        return float(min(self.budget, length - 1) + 1)

    def _pooled(self, mass: Float[Array, "b g t"]) -> Float[Array, "b g t"]:
        return jax.lax.reduce_window(mass, 0.0, jax.lax.max, (1, 1, self.kernel), (1, 1, 1), "SAME")


@chz.chz(typecheck=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall linearly with depth (Cai et al. 2024, 2406.02069, section 4.1): `budget` is their
    mean over the layers with a cache policy, the last has budget / `steepness`, and none less than `window`."""

    steepness: float = chz.field(default=20.0, validator=at_least(1))

    def budget_of(self, sizes: CacheSizes) -> int:
        if sizes.depth == 1:
            return self.budget
        last = self.budget / self.steepness
        first = 2 * self.budget - last
        return max(self.window, round(first + (last - first) * sizes.layer / (sizes.depth - 1)))
