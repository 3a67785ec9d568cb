"""Mosaic TPU kernels: a program goes through the chunks of a few heads with their states in VMEM; the gradient is two
such scans.

Arrays stay (b, t, heads x dimensions): a block holds as many heads as make its lanes a multiple of 128 (or all of
them). One number per token is stored as rows, never as columns, whose lanes would be padded to 128. Features are made
in VMEM, chunk by chunk.
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
from recollect.pallas_kernels.taylor_attention.tpu_scan import TaylorBlocks, TaylorShape, chunk_of, join_state, scan

MOST_KEY_DIM = 32  # 561 features; a chunk's take 300 kB, and several such arrays live at once
STATES = ("", "_normaliser")  # suffixes of the names of states
VMEM_BYTES = 12 * 2**20  # of the 16 MiB that a program gets by default


def refuses(inputs: Recurrence, *, chunk_size: int | None = None, **_) -> str | None:
    """Returns why the kernels cannot serve a call; None if they can."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if q.shape[3] > MOST_KEY_DIM:
        return f"it takes at most {MOST_KEY_DIM} key dimensions; got {q.shape[3]}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k and v must all be bfloat16 or all float32; got {q.dtype}, {k.dtype}, {v.dtype}"
    shape = TaylorShape.of(q.shape[0], q.shape[1], v.shape[2], q.shape[3], v.shape[3], chunk_of(q.shape[1], chunk_size))
    if shape.vmem_bytes > VMEM_BYTES:
        sizes = f"{shape.group} heads of {q.shape[3]} and {v.shape[3]} dimensions at {shape.chunk} tokens per chunk"
        return f"{sizes} do not fit into VMEM"
    return None


@dataclasses.dataclass(frozen=True)
class TaylorBody:
    """What kernels know when they are traced."""

    shape: TaylorShape
    settings: TaylorSettings
    dtype: Any

    def dot(self, a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
        """The product of two matrices over these axes, fp32; operands rounded to the inputs' dtype."""
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

    def factors(self, x: jax.Array, ref: Any, factor: float) -> tuple[jax.Array, jax.Array]:
        """The two factors (chunk, features) whose product is phi(factor x)."""
        weight, left_one, right_one = (ref["rows"][row : row + 1] for row in range(3))
        left = self.dot(x, ref["left"][...]) * (weight * factor) + left_one
        return left, self.dot(x, ref["right"][...]) * self._right(right_one, factor) + right_one

    def features(self, x: jax.Array, ref: Any, factor: float) -> jax.Array:
        left, right = self.factors(x, ref, factor)
        return left * right

    def _right(self, right_one: jax.Array, factor: float) -> jax.Array:
        return jnp.where(right_one > 0, 0.0, factor)

    def into(self, d_features: jax.Array, factors: tuple[jax.Array, jax.Array], ref: Any, factor: float) -> jax.Array:
        """The gradient by x of phi(factor x), of the gradient d_features by phi."""
        by_left = d_features * factors[1] * (ref["rows"][0:1] * factor)
        by_right = d_features * factors[0] * self._right(ref["rows"][2:3], factor)
        return self.dot(by_left, ref["left"][...], (1, 1)) + self.dot(by_right, ref["right"][...], (1, 1))

    @property
    def query_factor(self) -> float:
        return query_factor(self.settings.scale, self.shape.key_dim)

    def mask(self, ref: Any) -> jax.Array:
        """(chunk, chunk): which keys a query sees."""
        size = (self.shape.chunk, self.shape.chunk)
        causal = jax.lax.broadcasted_iota(jnp.int32, size, 0) >= jax.lax.broadcasted_iota(jnp.int32, size, 1)
        if "marks" not in ref:
            return causal
        marks = ref["marks"]
        return causal & (_column(marks[0, SEGMENT : SEGMENT + 1]) == marks[0, KEY_SEGMENT : KEY_SEGMENT + 1])

    def weights(self, ref: Any) -> tuple[Any, Any, Any]:
        """Of each token's read and write (chunk, 1), and of the state (1, 1), fp32; None stands for ones."""
        if "marks" not in ref:
            return None, None, None
        reads, writes, keeps = (ref["marks"][0, row : row + 1].astype(jnp.float32) for row in (READS, WRITES, KEEPS))
        return _column(reads), _column(writes), keeps[:, :1]

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        return self.settings.scale * self.dot(q, k, (1, 1))


def _column(row: jax.Array) -> jax.Array:
    return row.reshape(row.shape[1], 1)


def _times(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    return x if weight is None else x * weight


def _start(ref: Any, states: Any) -> None:
    """Before the first chunk of a scan: the states that enter, or zeros."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for name, state in zip(STATES, states, strict=False):
            state[...] = ref["first" + name][0] if "first" + name in ref else jnp.zeros(state.shape, jnp.float32)


def _finish(ref: Any, states: Any) -> None:
    """After the last chunk of a scan: stores the states, if they are asked for."""

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for name, state in zip(STATES, states, strict=False):
            if "last" + name in ref:
                ref["last" + name][0] = state[...]


def _advance(
    body: TaylorBody,
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


def _forward_kernel(ref: Any, *states: Any, body: TaylorBody) -> None:
    """o, sums of weights, last states."""
    key_dim, value_dim = body.shape.key_dim, body.shape.value_dim
    _start(ref, states)
    mask, (reads, writes, keep) = body.mask(ref), body.weights(ref)
    for head in range(body.shape.group):
        q, k, v = (
            body.head(ref[name], head, size) for name, size in (("q", key_dim), ("k", key_dim), ("v", value_dim))
        )
        s = body.scores(q, k)
        # Rounded before they are summed: outputs are true averages, of one value that value.
        weights = jnp.where(mask, 1 + s + 0.5 * s * s, 0).astype(body.dtype)
        queries = _times(body.features(q, ref, body.query_factor), reads)
        o = body.dot(weights, v) + body.dot(queries, states[0][head])
        if body.settings.normalise:
            sums = jnp.sum(weights.astype(jnp.float32), axis=1, keepdims=True) + jnp.sum(
                queries * states[1][head], axis=1, keepdims=True
            )
            sums = sums + body.settings.epsilon
            o = o / sums
            ref["sums"][0, 0, head : head + 1] = sums.reshape(1, body.shape.chunk)
        ref["o"][0, :, head * value_dim : (head + 1) * value_dim] = o.astype(ref["o"].dtype)
        _advance(body, states, head, body.features(k, ref, 1.0), v, writes, keep, None)
    _finish(ref, states)


def _query_kernel(ref: Any, *states: Any, body: TaylorBody) -> None:
    """dq, a scan with the states of the forward one."""
    key_dim, value_dim = body.shape.key_dim, body.shape.value_dim
    _start(ref, states)
    mask, (reads, writes, keep) = body.mask(ref), body.weights(ref)
    for head in range(body.shape.group):
        q, k = (body.head(ref[name], head, key_dim) for name in "qk")
        v, do = (body.head(ref[name], head, value_dim) for name in ("v", "do"))
        ds = body.dot(do, v, (1, 1))
        d_queries = body.dot(do, states[0][head], (1, 1))
        if body.settings.normalise:
            inverse, dot = (_column(ref[name][0, 0, head : head + 1]) for name in ("inverses", "dots"))
            ds = (ds - dot) * inverse
            d_queries = (d_queries - dot * states[1][head]) * inverse
        ds = jnp.where(mask, ds * (1 + body.scores(q, k)), 0)
        dq = body.settings.scale * body.dot(ds, k)
        dq = dq + body.into(_times(d_queries, reads), body.factors(q, ref, body.query_factor), ref, body.query_factor)
        ref["dq"][0, :, head * key_dim : (head + 1) * key_dim] = dq.astype(ref["dq"].dtype)
        _advance(body, states, head, body.features(k, ref, 1.0), v, writes, keep, None)


def _key_value_kernel(ref: Any, *states: Any, body: TaylorBody) -> None:
    """dk, dv and the first state's gradient, a scan in reverse with the states' gradients."""
    key_dim, value_dim = body.shape.key_dim, body.shape.value_dim
    _start(ref, states)
    mask, (reads, writes, keep) = body.mask(ref), body.weights(ref)
    for head in range(body.shape.group):
        q, k = (body.head(ref[name], head, key_dim) for name in "qk")
        v, do = (body.head(ref[name], head, value_dim) for name in ("v", "do"))
        s, ds, dot = body.scores(q, k), body.dot(do, v, (1, 1)), None
        weights = jnp.where(mask, 1 + s + 0.5 * s * s, 0)
        if body.settings.normalise:
            inverse, dot = (_column(ref[name][0, 0, head : head + 1]) for name in ("inverses", "dots"))
            ds = (ds - dot) * inverse
            do = (do.astype(jnp.float32) * inverse).astype(do.dtype)
            dot = -dot * inverse
        ds = jnp.where(mask, ds * (1 + s), 0)
        factors = body.factors(k, ref, 1.0)
        dv = body.dot(weights, do, (0, 0)) + _times(body.dot(factors[0] * factors[1], states[0][head]), writes)
        d_keys = body.dot(v, states[0][head], (1, 1))
        if body.settings.normalise:
            d_keys = d_keys + states[1][head]
        dk = body.settings.scale * body.dot(ds, q, (0, 0)) + body.into(_times(d_keys, writes), factors, ref, 1.0)
        ref["dk"][0, :, head * key_dim : (head + 1) * key_dim] = dk.astype(ref["dk"].dtype)
        ref["dv"][0, :, head * value_dim : (head + 1) * value_dim] = dv.astype(ref["dv"].dtype)
        _advance(body, states, head, body.features(q, ref, body.query_factor), do, reads, keep, dot)
    _finish(ref, states)


class _TPUKernels:
    """See kernels.TaylorKernels."""

    def forward(self, q, k, v, state, marks, settings):
        body, blocks, inputs = _prepare(q, k, v, state, marks, settings)
        outputs = [blocks.tokens("o", jax.ShapeDtypeStruct(v.shape, body.dtype))]
        if settings.normalise:
            outputs.append(blocks.row("sums", jax.ShapeDtypeStruct(v.shape[:3], jnp.float32)))
        if settings.return_state:
            outputs += blocks.states("last")
        kernel = functools.partial(_forward_kernel, body=body)
        results = scan(kernel, blocks, inputs, outputs, "taylor_attention_forward")
        sums = results["sums"].reshape(v.shape[0], v.shape[2], v.shape[1]) if settings.normalise else None
        last = join_state(results, "last", count(q.shape[3])) if settings.return_state else None
        return results["o"].reshape(v.shape), sums, last

    def gradients(self, q, k, v, state, marks, do, inverses, dots, d_state, settings):
        cotangents = {"do": do} | ({"inverses": inverses, "dots": dots} if settings.normalise else {})
        body, blocks, inputs = _prepare(q, k, v, state, marks, settings, cotangents)
        like_q, like_v = (jax.ShapeDtypeStruct(x.shape, body.dtype) for x in (q, v))
        kernel = functools.partial(_query_kernel, body=body)
        dq = scan(kernel, blocks, inputs, [blocks.tokens("dq", like_q)], "taylor_attention_queries")["dq"]
        body, blocks, inputs = _prepare(q, k, v, d_state, marks, settings, cotangents, reverse=True)
        outputs = [blocks.tokens("dk", like_q), blocks.tokens("dv", like_v)]
        if state is not None:
            outputs += blocks.states("last")
        kernel = functools.partial(_key_value_kernel, body=body)
        results = scan(kernel, blocks, inputs, outputs, "taylor_attention_keys_values")
        d_first = join_state(results, "last", count(q.shape[3])) if state is not None else None
        return dq.reshape(q.shape), results["dk"].reshape(k.shape), results["dv"].reshape(v.shape), d_first


def _prepare(q, k, v, first, marks, settings, cotangents=None, reverse=False):
    """What is constant, the blocks, and the inputs of a scan that `first` enters (None: zeros)."""
    b, t, h, value_dim = v.shape
    shape = TaylorShape.of(b, t, h, q.shape[3], value_dim, settings.chunk)
    body, blocks = TaylorBody(shape, settings, jnp.dtype(v.dtype)), TaylorBlocks(shape, settings.normalise, reverse)
    inputs = [blocks.tokens(name, x) for name, x in zip("qkv", (q, k, v), strict=True)] + blocks.maps(body.dtype)
    if marks is not None:
        inputs.append(blocks.marks(marks))
    if first is not None:
        inputs += blocks.entering("first", first)
    for name, x in (cotangents or {}).items():
        inputs.append(blocks.tokens(name, x) if name == "do" else blocks.row(name, x))
    return body, blocks, inputs


taylor_attention = over_mesh(
    functools.partial(kernels.run_on_kernels, _TPUKernels(), chunk_of), {"inputs": DIMENSIONS}, ("b t h v", "b h k v")
)
