"""Mosaic TPU kernels: a program walks the chunks of a few heads with their states in VMEM; the gradient is two such
walks.

Arrays stay (b, t, heads x dimensions): a block holds as many heads as make its lanes a multiple of 128 (or all of
them). Numbers a token are rows, never columns, whose lanes would be padded to 128. Features are made in VMEM, chunk by
chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels.linear_recurrence.recurrence import DIMENSIONS, Recurrence
from recollect.pallas_kernels.sharding import over_mesh
from recollect.pallas_kernels.taylor_attention import kernels
from recollect.pallas_kernels.taylor_attention.features import count, query_factor
from recollect.pallas_kernels.taylor_attention.kernels import KEEPS, KEY_SEGMENT, READS, SEGMENT, WRITES, TaylorSettings
from recollect.pallas_kernels.taylor_attention.tpu_scan import Shape, chunk_of, joined, walk

MOST_KEY_DIM = 32  # 561 features; a chunk's take 300 kB, and several such arrays live at once
VMEM_BYTES = 12 * 2**20  # of the 16 MiB that a program gets by default


def refuses(inputs: Recurrence, *, chunk_size: int | None = None, **_) -> str | None:
    """Returns why the kernels cannot serve a call; None if they can."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if q.shape[3] > MOST_KEY_DIM:
        return f"it takes at most {MOST_KEY_DIM} key dimensions; got {q.shape[3]}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k and v must all be bfloat16 or all float32; got {q.dtype}, {k.dtype}, {v.dtype}"
    shape = Shape.of(q.shape[0], q.shape[1], v.shape[2], q.shape[3], v.shape[3], chunk_of(q.shape[1], chunk_size))
    if shape.vmem_bytes > VMEM_BYTES:
        return f"{shape.group} heads of {q.shape[3]} and {v.shape[3]} dimensions at {shape.chunk} tokens a chunk do not fit into VMEM"
    return None


@dataclasses.dataclass(frozen=True)
class Body:
    """What kernels know when they are traced."""

    shape: Shape
    settings: TaylorSettings
    dtype: Any
    marked: bool
    state: bool

    def dot(self, a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
        """The product of two matrices over the given axes, fp32; operands rounded to the inputs' dtype."""
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        dimensions = (((over[0],), (over[1],)), ((), ()))
        return jax.lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            dimensions,
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def head(self, ref: Any, head: int, size: int) -> jax.Array:
        return ref[0, :, head * size : (head + 1) * size]

    def factors(self, x: jax.Array, maps: Any, factor: float) -> tuple[jax.Array, jax.Array]:
        """The two factors (chunk, features) whose product is phi(factor x)."""
        left, right, rows = maps
        weight, left_one, right_one = rows[0:1], rows[1:2], rows[2:3]
        return self.dot(x, left[...]) * (weight * factor) + left_one, self.dot(x, right[...]) * self._right(
            right_one, factor
        ) + right_one

    def features(self, x: jax.Array, maps: Any, factor: float) -> jax.Array:
        left, right = self.factors(x, maps, factor)
        return left * right

    def _right(self, right_one: jax.Array, factor: float) -> jax.Array:
        return jnp.where(right_one > 0, 0.0, factor)

    def into(self, d_features: jax.Array, factors: tuple[jax.Array, jax.Array], maps: Any, factor: float) -> jax.Array:
        """The gradient by x of phi(factor x) whose own is d_features."""
        left, right, rows = maps
        by_left = d_features * factors[1] * (rows[0:1] * factor)
        by_right = d_features * factors[0] * self._right(rows[2:3], factor)
        return self.dot(by_left, left[...], (1, 1)) + self.dot(by_right, right[...], (1, 1))

    @property
    def query_factor(self) -> float:
        return query_factor(self.settings.scale, self.shape.key_dim)

    def seen(self, marks: Any) -> jax.Array:
        """(chunk, chunk): which keys a query sees."""
        size = (self.shape.chunk, self.shape.chunk)
        causal = jax.lax.broadcasted_iota(jnp.int32, size, 0) >= jax.lax.broadcasted_iota(jnp.int32, size, 1)
        if not self.marked:
            return causal
        return causal & (_column(marks[0, SEGMENT : SEGMENT + 1]) == marks[0, KEY_SEGMENT : KEY_SEGMENT + 1])

    def weights(self, marks: Any) -> tuple[Any, Any, Any]:
        """Of each token's read and write (chunk, 1), and of the state (1, 1), fp32; None stands for ones."""
        if not self.marked:
            return None, None, None
        reads, writes, keeps = (marks[0, row : row + 1].astype(jnp.float32) for row in (READS, WRITES, KEEPS))
        return _column(reads), _column(writes), keeps[:, :1]

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        return self.settings.scale * self.dot(q, k, (1, 1))


def _column(row: jax.Array) -> jax.Array:
    return row.reshape(row.shape[1], 1)


def _times(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    return x if weight is None else x * weight


def _start(body: Body, first: Any, states: Any, entered: Any, walked: bool) -> None:
    """Before the first chunk of a walk: states from what is given (walked) or zero."""

    @pl.when(first)
    def _():
        for i, state in enumerate(states):
            state[...] = entered[i][0] if walked else jnp.zeros(state.shape, jnp.float32)


def _finish(last: Any, states: Any, left: Any) -> None:
    """After the last chunk of a walk: the states to where they are left, if anywhere."""

    @pl.when(last)
    def _():
        for state, out in zip(states, left, strict=False):
            out[0] = state[...]


def _advance(
    body: Body,
    states: Any,
    head: int,
    features: jax.Array,
    v: jax.Array,
    weight: jax.Array | None,
    keep: Any,
    columns: Any,
) -> None:
    """states <- keep states + sum_j weight_j phi_j [v_j, columns_j]^T; columns (chunk, 1) or None for ones."""
    features = _times(features, weight)
    states[0][head] = _times(states[0][head], keep) + body.dot(features, v, (0, 0))
    if body.settings.normalise:
        states[1][head] = _times(states[1][head], keep) + jnp.sum(_times(features, columns), axis=0, keepdims=True)


def _forward_kernel(*references: Any, body: Body) -> None:
    """o, sums of weights, last states."""
    refs = list(references)
    q_, k_, v_, maps, marks, entered = _inputs(refs, body)
    o_, sums_ = refs.pop(0), refs.pop(0) if body.settings.normalise else None
    count_ = _state_count(body)
    left, states = (refs[:count_] if body.settings.return_state else []), refs[-count_:]
    step, key_dim, value_dim = pl.program_id(2), body.shape.key_dim, body.shape.value_dim
    _start(body, step == 0, states, entered, body.state)
    seen, (reads, writes, keep) = body.seen(marks), body.weights(marks)
    for head in range(body.shape.group):
        q, k, v = body.head(q_, head, key_dim), body.head(k_, head, key_dim), body.head(v_, head, value_dim)
        s = body.scores(q, k)
        # Rounded before they are summed: outputs are true averages, of one value that value.
        weights = jnp.where(seen, 1 + s + 0.5 * s * s, 0).astype(body.dtype)
        queries = _times(body.features(q, maps, body.query_factor), reads)
        o = body.dot(weights, v) + body.dot(queries, states[0][head])
        if sums_ is not None:
            sums = jnp.sum(weights.astype(jnp.float32), axis=1, keepdims=True) + jnp.sum(
                queries * states[1][head], axis=1, keepdims=True
            )
            sums = sums + body.settings.epsilon
            o = o / sums
            sums_[0, 0, head : head + 1] = sums.reshape(1, body.shape.chunk)
        o_[0, :, head * value_dim : (head + 1) * value_dim] = o.astype(o_.dtype)
        _advance(body, states, head, body.features(k, maps, 1.0), v, writes, keep, None)
    _finish(step == pl.num_programs(2) - 1, states, left)


def _query_kernel(*references: Any, body: Body) -> None:
    """dq, walking forwards with the states of the forward pass."""
    refs = list(references)
    q_, k_, v_, maps, marks, entered = _inputs(refs, body)
    do_, inverses_, dots_ = _cotangents(refs, body)
    dq_, states = refs[0], refs[1:]
    key_dim, value_dim = body.shape.key_dim, body.shape.value_dim
    _start(body, pl.program_id(2) == 0, states, entered, body.state)
    seen, (reads, writes, keep) = body.seen(marks), body.weights(marks)
    for head in range(body.shape.group):
        q, k, v = body.head(q_, head, key_dim), body.head(k_, head, key_dim), body.head(v_, head, value_dim)
        do = body.head(do_, head, value_dim)
        ds = body.dot(do, v, (1, 1))
        d_queries = body.dot(do, states[0][head], (1, 1))
        if body.settings.normalise:
            inverse, dot = (_column(x[0, 0, head : head + 1]) for x in (inverses_, dots_))
            ds = (ds - dot) * inverse
            d_queries = (d_queries - dot * states[1][head]) * inverse
        ds = jnp.where(seen, ds * (1 + body.scores(q, k)), 0)
        dq = body.settings.scale * body.dot(ds, k)
        dq = dq + body.into(_times(d_queries, reads), body.factors(q, maps, body.query_factor), maps, body.query_factor)
        dq_[0, :, head * key_dim : (head + 1) * key_dim] = dq.astype(dq_.dtype)
        _advance(body, states, head, body.features(k, maps, 1.0), v, writes, keep, None)


def _key_value_kernel(*references: Any, body: Body) -> None:
    """dk, dv and the first state's gradient, walking in reverse with the states' gradients."""
    refs = list(references)
    q_, k_, v_, maps, marks, entered = _inputs(refs, body, states=body.settings.return_state)
    do_, inverses_, dots_ = _cotangents(refs, body)
    dk_, dv_, count_ = refs.pop(0), refs.pop(0), _state_count(body)
    left, states = (refs[:count_] if body.state else []), refs[-count_:]
    step, key_dim, value_dim = pl.program_id(2), body.shape.key_dim, body.shape.value_dim
    _start(body, step == 0, states, entered, body.settings.return_state)
    seen, (reads, writes, keep) = body.seen(marks), body.weights(marks)
    for head in range(body.shape.group):
        q, k, v = body.head(q_, head, key_dim), body.head(k_, head, key_dim), body.head(v_, head, value_dim)
        do = body.head(do_, head, value_dim)
        s, ds, dot = body.scores(q, k), body.dot(do, v, (1, 1)), None
        weights = jnp.where(seen, 1 + s + 0.5 * s * s, 0)
        if body.settings.normalise:
            inverse, dot = (_column(x[0, 0, head : head + 1]) for x in (inverses_, dots_))
            ds = (ds - dot) * inverse
            do = (do.astype(jnp.float32) * inverse).astype(do.dtype)
            dot = -dot * inverse
        ds = jnp.where(seen, ds * (1 + s), 0)
        factors = body.factors(k, maps, 1.0)
        dv = body.dot(weights, do, (0, 0)) + _times(body.dot(factors[0] * factors[1], states[0][head]), writes)
        d_keys = body.dot(v, states[0][head], (1, 1))
        if body.settings.normalise:
            d_keys = d_keys + states[1][head]
        dk = body.settings.scale * body.dot(ds, q, (0, 0)) + body.into(_times(d_keys, writes), factors, maps, 1.0)
        dk_[0, :, head * key_dim : (head + 1) * key_dim] = dk.astype(dk_.dtype)
        dv_[0, :, head * value_dim : (head + 1) * value_dim] = dv.astype(dv_.dtype)
        _advance(body, states, head, body.features(q, maps, body.query_factor), do, reads, keep, dot)
    _finish(step == pl.num_programs(2) - 1, states, left)


def _state_count(body: Body) -> int:
    return 2 if body.settings.normalise else 1


def _inputs(refs: list[Any], body: Body, states: bool | None = None) -> tuple[Any, ...]:
    """Takes q, k, v, the feature maps, marks and entering states off the front of a kernel's references."""
    q, k, v, *maps = (refs.pop(0) for _ in range(6))
    marks = refs.pop(0) if body.marked else None
    given = body.state if states is None else states
    return q, k, v, maps, marks, [refs.pop(0) for _ in range(_state_count(body) if given else 0)]


def _cotangents(refs: list[Any], body: Body) -> tuple[Any, Any, Any]:
    return (refs.pop(0), refs.pop(0), refs.pop(0)) if body.settings.normalise else (refs.pop(0), None, None)


class _TPUKernels:
    """See kernels.TaylorKernels."""

    def forward(self, q, k, v, state, marks, settings):
        body = _body(q, v, state, marks, settings)
        outputs = (
            [("tokens", body.shape.value_dim)]
            + [("row", 0)] * settings.normalise
            + [("states", 0)] * settings.return_state
        )
        o, *rest = _walk(_forward_kernel, body, False, q, k, v, marks, state, None, outputs, "taylor_attention_forward")
        sums = rest.pop(0).reshape(v.shape[0], v.shape[2], v.shape[1]) if settings.normalise else None
        return o.reshape(v.shape), sums, joined(rest, count(q.shape[3])) if settings.return_state else None

    def gradients(self, q, k, v, state, marks, do, inverses, dots, d_state, settings):
        body = _body(q, v, state, marks, settings)
        given, key, value = (do, inverses, dots), ("tokens", body.shape.key_dim), ("tokens", body.shape.value_dim)
        (dq,) = _walk(_query_kernel, body, False, q, k, v, marks, state, given, [key], "taylor_attention_queries")
        outputs = [key, value] + [("states", 0)] * body.state
        dk, dv, *rest = _walk(
            _key_value_kernel, body, True, q, k, v, marks, d_state, given, outputs, "taylor_attention_keys_values"
        )
        first = joined(rest, count(q.shape[3])) if body.state else None
        return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), first


def _walk(kernel, body: Body, reverse: bool, *rest):
    return walk(functools.partial(kernel, body=body), body.shape, body.settings, body.dtype, reverse, *rest)


taylor_attention = over_mesh(
    functools.partial(kernels.run_on_kernels, _TPUKernels(), chunk_of), {"inputs": DIMENSIONS}, ("b t h v", "b h k v")
)


def _body(q, v, state, marks, settings) -> Body:
    b, t, h, value_dim = v.shape
    shape = Shape.of(b, t, h, q.shape[3], value_dim, settings.chunk)
    return Body(shape, settings, jnp.dtype(v.dtype), marks is not None, state is not None)
