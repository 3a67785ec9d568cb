"""Softmax attention that decodes by a cache policy (layers/state/cache_policy.py): the module of an `Attention` whose
`cache` is not `Full`. Parameters and whole sequences are those of `SoftmaxAttention`; only states differ.

Key heads are rows of the operation, because each may keep, and read, other tokens; one softmax goes over all views of
what a token reads, merged by their log-sum-exps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recollect.layers.mixer import Context, MixerOutput, zero_padding
from recollect.layers.mixers.attention import SoftmaxAttention
from recollect.layers.state.cache_policy import CacheSizes, NewTokens, View, one_by_one
from recollect.layers.state.capacity import check_capacity, check_positions
from recollect.layers.state.policy_state import PolicyState
from recollect.layers.state.reads import Reads, mass_kept, measuring, report
from recollect.pallas_kernels.masks import Causal, SameSegment, TokenFields
from recollect.pallas_kernels.scheduled_attention.merge_parts import merge
from recollect.pallas_kernels.segments import carry_segments
from recollect.pallas_kernels.softmax_attention import softmax_attention
from recollect.pallas_kernels.softmax_attention.key_mass import key_mass


class PolicyAttention(SoftmaxAttention):
    """Softmax attention with a cache policy."""

    caches_rotated_keys = False  # `_project` leaves rotation to what follows
    policy_layer: tuple[int, int] = (0, 1)
    """Which of the model's layers with a cache policy this is, and how many there are: the stack sets it."""

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> PolicyState:  # type: ignore[override]
        """Returns the policy's cache."""
        self._check_length(max_length)
        g, dim = self.key_heads, self.head_dim
        sizes = CacheSizes(batch_size, max_length, g, dim, dim, dtype, self.config.heads // g, *self.policy_layer)
        return PolicyState.create(self.config.cache, sizes)

    def extend(
        self, x: Float[Array, "b t d"], state: PolicyState, context: Context = Context()
    ) -> tuple[MixerOutput, PolicyState]:
        """Mixes the next tokens: one per row by the policy's `step`; many read each other and what the cache holds."""
        policy, (b, t, _) = self.config.cache, x.shape
        tokens, cursor = state.cursor.read(context, b, t)
        assert tokens.positions is not None and tokens.segments is not None
        check_positions(state.cursor, tokens, self.config.traits.maximum_length)
        check_capacity(state, tokens.segments)
        x = zero_padding(x, tokens)
        q, k, v = self._project(x, tokens.positions, tokens)
        valid = tokens.segments != 0
        number = state.count[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid
        documents = carry_segments(tokens.segments, state.cursor.segment)
        stored = k if policy.unrotated else self._rotated(k, tokens.positions)
        k, v = (jnp.moveaxis(y, 2, 1) for y in (stored, v))
        new = NewTokens(k, v, tokens.positions, tokens.segments, number, documents)
        if t == 1:
            o, cache, reads = self._step(x, q, state.cache, new)
            report(lambda: reads)
        elif policy.by_token:

            def step(cache: Any, token: tuple[jax.Array, jax.Array, NewTokens]) -> tuple[Any, jax.Array]:
                x, q, new = token
                out, cache, _ = self._step(x, q, cache, new)
                return cache, out[:, 0]

            by_token: Any = (*(jnp.moveaxis(y[:, :, None], 1, 0) for y in (x, q)), one_by_one(new))
            cache, o = jax.lax.scan(step, state.cache, by_token)
            o = jnp.moveaxis(o, 0, 1)
        else:
            views = (*policy.past(state.cache, new), *policy.among(new))
            o, _, masses = self._read_views(x, q, new, views)
            cache = policy.prefill(state.cache, new, views, masses, o)
        count = state.count + jnp.sum(valid, axis=1, dtype=jnp.int32)
        return self._finish(o, x), dataclasses.replace(state, cache=cache, count=count, cursor=cursor)

    def _step(self, x: jax.Array, q: jax.Array, cache: Any, new: NewTokens) -> tuple[jax.Array, Any, Reads]:
        """Returns the policy's `step`."""
        policy = self.config.cache
        asked = q if policy.unrotated else self._rotated(q, new.positions)
        asked = asked.reshape(len(q), self.key_heads, -1, q.shape[-1])
        return policy.step(cache, asked, new, _NewestTokens(self, x, q, new))

    def _read_views(
        self, x: Float[Array, "b t d"], q: Float[Array, "b t h k"], new: NewTokens, views: tuple[View, ...]
    ) -> tuple[Float[Array, "b t h v"], Float[Array, "b t h"], tuple[Float[Array, "b g _"], ...]]:
        """Returns attention over all keys of the views, the log-sum-exps of the scores, and the mass that each key got
        where the policy observes it."""
        (b, t, h, dim), g = q.shape, self.key_heads
        rows = self.config.cache.mass_rows

        def by_head(field: jax.Array) -> jax.Array:
            return jnp.broadcast_to(field, (b, g, field.shape[2])).reshape(b * g, -1)

        q = jnp.moveaxis(q.reshape(b, t, g, h // g, dim), 2, 1).reshape(b * g, t, h // g, dim)
        calls, parts = [], []
        for view in views:
            at = new.positions[:, None] if view.query_positions is None else view.query_positions
            query, key = (
                TokenFields(by_head(positions), by_head(segments))
                for positions, segments in ((at, new.segments[:, None]), (view.positions, view.segments))
            )
            keys, values = (y.reshape(b * g, -1, 1, y.shape[-1]).astype(q.dtype) for y in (view.keys, view.values))
            keys = self._rotated(keys, key.positions) if view.unrotated else keys
            turned = self._rotated(q, query.positions)
            fields: dict[str, Any] = {f"query_{name}": field for name, field in query.present().items()}
            fields |= {f"key_{name}": field for name, field in key.present().items()}
            mask = Causal() & SameSegment()
            mask = mask if view.mask is None else mask & view.mask
            seen: dict[str, Any] = {"mask": mask, "bias": self._bias_by_head(x, turned, keys, fields)}
            parts.append(softmax_attention(turned, keys, values, **seen, **fields, return_lse=True))
            calls.append((turned, keys, {**seen, "query_fields": query, "key_fields": key}))
        o, lse = merge(*parts) if len(parts) > 1 else parts[0]
        masses: tuple[jax.Array, ...] = ()
        if rows is not None:
            last = None if rows == 0 or t == 1 else jnp.repeat(_last_valid(new.valid, rows), g, axis=0)
            found = (key_mass(turned, keys, lse, **call, rows=last) for turned, keys, call in calls)
            masses = tuple(jnp.sum(mass, axis=1).reshape(b, g, -1) for mass in found)
        o, lse = (jnp.moveaxis(y.reshape(b, g, t, h // g, -1), 1, 2).reshape(b, t, h, -1) for y in (o, lse))
        return o, lse[..., 0], masses

    def _bias_by_head(self, x: jax.Array, q: jax.Array, k: jax.Array, fields: dict[str, Any]) -> jax.Array | None:
        """Returns the bias of scores whose rows are key heads, (b g, r, t, s): of each row the heads that are its."""
        bias = self._bias(x, q, k, fields)
        if bias is None:
            return None
        g = self.key_heads
        bias = bias.reshape(-1, g, g, bias.shape[1] // g, *bias.shape[2:])
        return bias[:, jnp.arange(g), jnp.arange(g)].reshape(-1, *bias.shape[3:])

    def _mix(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        """Mixes whole sequences."""
        at = fields["query_positions"]
        at = jnp.arange(q.shape[1], dtype=jnp.int32)[None] if at is None else at
        return super()._mix(x, self._rotated(q, at), self._rotated(k, at), v, fields)

    def _rotated(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x if self.positions is None else self.positions.rotate(x, positions)


@dataclasses.dataclass(frozen=True)
class _NewestTokens:
    """The reader that policies get."""

    module: PolicyAttention
    x: jax.Array
    q: jax.Array
    new: NewTokens

    def __call__(self, views: tuple[View, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, _, masses = self.module._read_views(self.x, self.q, self.new, views)
        return out, masses

    def mass_kept(self, views: tuple[View, ...], every: tuple[View, ...]) -> jax.Array | None:
        if not measuring():
            return None
        of_read, of_all = (self.module._read_views(self.x, self.q, self.new, some)[1] for some in (views, every))
        return mass_kept(of_read, of_all, self.new.segments)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return self.module._rotated(x, positions)


def _last_valid(valid: jax.Array, rows: int) -> jax.Array:
    """Returns the indices of the last `rows` valid tokens of each row, -1 where there are fewer."""
    index = jnp.where(valid, jnp.arange(valid.shape[1], dtype=jnp.int32), -1)
    return jax.lax.top_k(index, min(rows, valid.shape[1]))[0]
