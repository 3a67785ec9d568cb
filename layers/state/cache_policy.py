"""Cache policies: whose keys and values a softmax mixer keeps while it decodes, and which of them a token reads.

    cache = policy.init(sizes)                            # arrays of fixed shapes: their bytes are what is held

    cache = policy.append(cache, new)                     # one token per row (`step` makes these three calls)
    views = policy.select(cache, q, new)                  # what it reads: keys, values, and their fields
    cache = policy.observe(cache, views, masses)          # the probability that each key got

    views = policy.past(cache, new) + policy.among(new)   # many tokens at once: what they read of those before them,
    cache = policy.prefill(cache, new, views, masses, out)  # and of each other

A policy is a choice of use: parameters do not depend on it, whole sequences are mixed without it, and `extend` goes by
it (layers/mixers/policy_attention.py is the driver). Key heads may keep different tokens, so everything is stored per
key head, and attention takes heads as rows. Fields that all heads share have a head axis of one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recollect.configuration import Config, UserError
from recollect.layers.state.reads import Reads
from recollect.pallas_kernels.masks import Mask


@dataclasses.dataclass(frozen=True)
class CacheSizes:
    """What a cache is made for: rows, tokens of the longest stream, and the shapes of a layer's keys and values.

    Attributes:
      queries: query heads of each key head.
      layer, depth: which of the layers with a cache policy this is, and how many there are.
    """

    batch_size: int
    max_length: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: Any = jnp.float32
    queries: int = 1
    layer: int = 0
    depth: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tokens that enter a cache.

    Attributes:
      keys, values: per key head; keys are rotated unless the policy is `unrotated`.
      positions, segments: of each token; segment 0 is padding, which is never kept.
      number: how many tokens of the row came before, padding not counted.
      documents: the row's document at each token; at padding that of the token before.
    """

    keys: Float[Array, "b g t k"]
    values: Float[Array, "b g t v"]
    positions: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    number: Int[Array, "b t"]
    documents: Int[Array, "b t"]

    @property
    def valid(self) -> Bool[Array, "b t"]:
        """Which tokens are no padding."""
        return self.segments != 0

    def view(self) -> View:
        """Returns the tokens as keys that can be read."""
        return View(self.keys, self.values, self.positions[:, None], self.segments[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Keys and values that queries may read, with their fields. A token's output is one softmax over all its views.

    Attributes:
      positions, segments: of each key; segment 0 marks a place that holds none.
      query_positions: where the queries stand as these keys see them; None: where they stand in the document.
      mask: hides keys beside what the mixer's own mask does.
      unrotated: keys have to be rotated to `positions` before they are read.
      slots: where each key lies in the cache; None: in order.
    """

    keys: Float[Array, "b g n k"]
    values: Float[Array, "b g n v"]
    positions: Int[Array, "#b #g n"]
    segments: Int[Array, "#b #g n"]
    query_positions: Int[Array, "#b #g t"] | None = None
    slots: Int[Array, "b g n"] | None = None
    mask: Mask | None = dataclasses.field(default=None, metadata={"static": True})
    unrotated: bool = dataclasses.field(default=False, metadata={"static": True})

    def keys_read(self) -> Float[Array, " b"]:
        """Returns the number of keys per row, a mean over key heads."""
        return jnp.mean(jnp.sum(self.segments != 0, axis=-1, dtype=jnp.float32), axis=1)


@runtime_checkable
class Reader(Protocol):
    """Attention of the newest tokens over views."""

    def __call__(self, views: tuple[View, ...]) -> tuple[Any, tuple[Any, ...]]:
        """Returns the heads' outputs (b, t, h, v), and where the policy has `mass_rows` the mass (b, g, n) of the keys
        of each view, summed over those queries and over the query heads of a key head."""

    def mass_kept(self, views: tuple[View, ...], every: tuple[View, ...]) -> Float[Array, " b"] | None:
        """Returns the share of the probability of full attention, over `every` key, that the keys of `views` hold;
        None where nobody measures it."""

    def rotate(self, x: Float[Array, "*b n h k"], positions: Int[Array, "*#b n"]) -> Float[Array, "*b n h k"]:
        """Returns queries or keys with their positions in them."""


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a policy costs one sequence in one layer: bytes held, and keys per key head that a token at the end of it
    reads (a mean over the steps where these differ)."""

    bytes_held: int
    keys_read: float


@chz.chz(typecheck=True)
class CachePolicy(Config):
    """Base of cache policies: configs, which hold no arrays. Caches are pytrees whose leaves begin with the rows."""

    unrotated: ClassVar[bool] = False
    """Keys are stored as they are before rotation."""

    by_token: ClassVar[bool] = False
    """Many tokens at once are given to `step` one by one, too; `past`, `among` and `prefill` are not called."""

    whole_prompts: ClassVar[bool] = False
    """A prompt is to be given at once, however long: what is kept of it depends on where it ends."""

    @property
    def mass_rows(self) -> int | None:
        """The last queries of a call whose probabilities the policy observes; 0: all; None: it observes nothing."""
        return None

    def init(self, sizes: CacheSizes) -> Any:
        """Returns the cache before any token."""
        raise UserError(f"{type(self).__name__} is no cache policy: name one that layers/state/__init__.py exports")

    def capacity(self, sizes: CacheSizes) -> int | None:
        """Returns the tokens that a row takes; None: any number, since old ones make room."""
        return sizes.max_length

    def append(self, cache: Any, new: NewTokens) -> Any:
        """Returns the cache with one token per row; padding changes nothing. The token is read from the cache."""
        raise NotImplementedError

    def select(self, cache: Any, q: Float[Array, "b g r k"], new: NewTokens) -> tuple[View, ...]:
        """Returns what the newest token reads. `q` are its queries by key head, rotated as keys are stored."""
        raise NotImplementedError

    def observe(self, cache: Any, views: tuple[View, ...], masses: tuple[Float[Array, "b g _"], ...]) -> Any:
        """Returns the cache after the newest token has read `views`; `masses` are the probabilities of their keys."""
        return cache

    def step(
        self, cache: Any, q: Float[Array, "b g r k"], new: NewTokens, read: Reader
    ) -> tuple[Float[Array, "b 1 h v"], Any, Reads]:
        """Returns the heads' outputs for one token per row, the cache with it, and what it read."""
        cache = self.append(cache, new)
        views = self.select(cache, q, new)
        out, masses = read(views)
        number = sum((view.keys_read() for view in views), jnp.zeros(len(q)))
        return out, self.observe(cache, views, masses), Reads(number)

    def past(self, cache: Any, new: NewTokens) -> tuple[View, ...]:
        """Returns what many new tokens read of those before them."""
        raise NotImplementedError

    def among(self, new: NewTokens) -> tuple[View, ...]:
        """Returns what many new tokens read of each other."""
        return (new.view(),)

    def prefill(
        self,
        cache: Any,
        new: NewTokens,
        views: tuple[View, ...],
        masses: tuple[Float[Array, "b g _"], ...],
        out: Float[Array, "b t h v"],
    ) -> Any:
        """Returns the cache with many tokens, which have read `views`: what `past` and `among` returned. `out` are the
        heads' outputs."""
        del views, masses, out

        def step(cache: Any, token: NewTokens) -> tuple[Any, None]:
            return self.append(cache, token), None

        return jax.lax.scan(step, cache, one_by_one(new))[0]

    def keys_read(self, length: int) -> float:
        """Returns the keys per key head that a token at the end of `length` tokens reads, as far as that follows from
        the config; what a run reads is measured."""
        return float(length)

    def footprint(self, sizes: CacheSizes) -> Footprint:
        """Returns bytes and keys read of a full stream of one row."""
        one = dataclasses.replace(sizes, batch_size=1)
        leaves = jax.tree.leaves(jax.eval_shape(lambda: self.init(one)))
        return Footprint(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), self.keys_read(sizes.max_length))


@chz.chz(typecheck=True)
class Full(CachePolicy):
    """Every key and value is kept and read: the mixer's own cache (key_value_cache.py)."""


def one_by_one(new: NewTokens) -> NewTokens:
    """Returns the tokens with a leading axis over them, each with a time axis of one: what a scan takes."""

    def split(x: jax.Array) -> jax.Array:
        axis = 1 if x.ndim == 2 else 2
        return jnp.moveaxis(jnp.expand_dims(x, axis + 1), axis, 0)

    return jax.tree.map(split, new)
