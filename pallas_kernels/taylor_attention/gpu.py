"""Mosaic GPU kernels, for NVIDIA Hopper; gpu_body.py says how they work.

The part of the normaliser that comes from before a chunk is a quadratic form of the query, [1, q] M [1, q]^T with M the
moments sum_j [1, k_j] [1, k_j]^T: (k + 1)^2 numbers a chunk, which XLA sums and reads in fp32, and differentiates.
Kernels get it a row a chunk.

Few rows and heads would leave most cores idle: then time is cut in pieces, as the recurrence's is
(pallas_kernels/linear_recurrence/gpu.py).

Not served: fp32 (Hopper's tensor cores transpose 16-bit operands only), and more than 16 key dimensions, whose state
spills registers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.linear_recurrence.gpu import spans_to_fill
from recollect.pallas_kernels.linear_recurrence.recurrence import DIMENSIONS, Recurrence
from recollect.pallas_kernels.linear_recurrence.sequence_parallel import entering_states
from recollect.pallas_kernels.sharding import over_mesh
from recollect.pallas_kernels.taylor_attention import gpu_body, kernels
from recollect.pallas_kernels.taylor_attention.features import count, selections
from recollect.pallas_kernels.taylor_attention.gpu_plan import CHUNK, COLUMNS, KEEP, KEY_COLUMNS, MAPS, SWIZZLE, Plan
from recollect.pallas_kernels.taylor_attention.kernels import KEEPS, KEY_SEGMENT, READS, SEGMENT, WRITES, TaylorSettings
from recollect.pallas_kernels.tuning import block_sizes

LARGEST_VALUE_DIM = 256


def refuses(inputs: Recurrence, *, chunk_size: int | None = None, **_) -> str | None:
    """Returns why the kernels cannot serve a call; None if they can."""
    q, k, v = inputs.q, inputs.k, inputs.v
    missing = gpu.unavailable()
    if missing:
        return missing
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            return f"its products take bfloat16; {name} is {x.dtype}"
    if q.shape[3] > KEY_COLUMNS:
        return f"it takes at most {KEY_COLUMNS} key dimensions, whose features a warpgroup's registers hold; got {q.shape[3]}"
    if v.shape[3] > LARGEST_VALUE_DIM:
        return f"it takes at most {LARGEST_VALUE_DIM} value dimensions; got {v.shape[3]}"
    return None


class _GPUKernels:
    """See kernels.TaylorKernels."""

    def forward(self, q, k, v, state, marks, settings):
        columns, moments = _apart(state, settings.normalise)
        rows, last = None, None
        if settings.normalise:
            before, last = _between(q.astype(jnp.float32), k.astype(jnp.float32), moments, marks, settings)
            rows = before[..., None] + settings.epsilon
        out = _walk("forward", q, k, v, None, rows, columns, marks, settings, settings.return_state)
        sums = out["sums"][0] if settings.normalise else None
        state = _joined(out["state"], last, q.shape[3], v.shape[3]) if settings.return_state else None
        return out["o"][..., : v.shape[3]], sums, state

    def gradients(self, q, k, v, state, marks, do, inverses, dots, d_state, settings):
        key_dim, value_dim = q.shape[3], v.shape[3]
        columns, moments = _apart(state, settings.normalise)
        rows = jnp.stack([inverses, dots], axis=-1) if settings.normalise else None
        out = _walk("queries", q, k, v, do, rows, columns, marks, settings, False)
        dq = jnp.sum(out["dq"], axis=0)[..., :key_dim]
        weights = _weights(key_dim)[:, None]
        d_columns = d_moments = None
        if d_state is not None:
            d_columns = d_state[..., :value_dim] * weights
            d_moments = d_state[..., value_dim] if settings.normalise else None
        out = _walk("keys_values", q, k, v, do, rows, d_columns, marks, settings, state is not None)
        dk, dv = jnp.sum(out["dk"], axis=0)[..., :key_dim], out["dv"][..., :value_dim]
        d_first = out["state"][:, :, : count(key_dim), :value_dim] / weights if state is not None else None
        if settings.normalise:
            pull = jax.vjp(
                lambda q, k, z: _between(q, k, z, marks, settings), *(x.astype(jnp.float32) for x in (q, k)), moments
            )[1]
            d_moments = jnp.zeros((*v.shape[::2], count(key_dim)), jnp.float32) if d_moments is None else d_moments
            more_q, more_k, d_moments = pull((-dots * inverses, d_moments))
            dq, dk = dq + more_q, dk + more_k
            d_first = None if d_first is None else jnp.concatenate([d_first, d_moments[..., None]], axis=-1)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv, d_first


def _chunk_of(t: int, chunk_size: int | None) -> int:
    """64 tokens, the rows of a tensor core instruction, whatever is asked for."""
    return CHUNK


taylor_attention = over_mesh(
    functools.partial(kernels.run_on_kernels, _GPUKernels(), _chunk_of), {"inputs": DIMENSIONS}, ("b t h v", "b h k v")
)


def _walk(walk, q, k, v, do, rows, state, marks, settings: TaylorSettings, leaves: bool) -> dict[str, jax.Array]:
    b, t, h, key_dim = q.shape
    value_dim = gpu.round_up(v.shape[3], COLUMNS)
    n, features = t // CHUNK, gpu.round_up(count(key_dim), SWIZZLE // 2)
    inputs = {"q": gpu.pad_last(q, KEY_COLUMNS), "k": gpu.pad_last(k, KEY_COLUMNS), "v": gpu.pad_last(v, value_dim)}
    if do is not None:
        inputs["do"] = gpu.pad_last(do.astype(v.dtype), value_dim)
    inputs |= dict(zip(MAPS, _maps(key_dim, features), strict=True))
    if rows is not None:
        inputs["rows"] = jnp.swapaxes(rows.reshape(b, h, n, CHUNK, -1), 3, 4)
    if marks is not None:
        inputs["marks"] = _marks(marks)
    if state is not None:
        state = jnp.pad(state, ((0, 0), (0, 0), (0, features - state.shape[2]), (0, value_dim - state.shape[3])))
        inputs["initial"] = jnp.swapaxes(state, 2, 3)
    plan = Plan(
        walk=walk,
        b=b,
        t=t,
        heads=h,
        value_dim=value_dim,
        features=features,
        scale=settings.scale,
        rows=0 if rows is None else rows.shape[-1],
        marked=marks is not None,
        enters=state is not None,
        leaves=leaves,
    )
    plan = _cut(plan, v.shape[3])
    if plan.spans > 1:
        inputs["initial"] = _entering(plan, inputs)
        plan = dataclasses.replace(plan, enters=True)
    out = gpu_body.launch(plan, inputs)
    return out | ({"state": jnp.swapaxes(out["state"], 2, 3)} if leaves else {})


def _cut(plan: Plan, value_dim: int) -> Plan:
    """The plan, in as many pieces of time as a tuning table says or fill the device; none is empty."""
    sizes = block_sizes(
        "taylor_attention.gpu_spans",
        lambda **_: {"pieces": spans_to_fill(plan.b * plan.heads * plan.splits, plan.t)},
        b=plan.b,
        t=plan.t,
        h=plan.heads,
        v=value_dim,
    )
    span = -(-plan.n // min(sizes["pieces"], plan.n))
    return dataclasses.replace(plan, spans=-(-plan.n // span))


def _entering(plan: Plan, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """The states (b, spans, h, v, features) that enter the spans, in the order of the walk."""
    alone = dataclasses.replace(
        plan,
        walk="query_states" if plan.reverse else "key_states",
        rows=plan.rows if plan.reverse else 0,
        enters=False,
        leaves=True,
    )
    read = {*alone.stages(), *alone.maps}
    states = gpu_body.launch(alone, {name: x for name, x in inputs.items() if name in read})["state"]
    keeps = jnp.ones((plan.b, plan.spans - 1), jnp.float32)
    if plan.marked:
        keeps = inputs["marks"][:, :, KEEP, 0]
        keeps = (jnp.flip(keeps, axis=1) if plan.reverse else keeps)[:, : (plan.spans - 1) * plan.span]
        keeps = jnp.prod(keeps.reshape(plan.b, plan.spans - 1, plan.span), axis=2)
    return entering_states(states, keeps[:, :, None, None, None], inputs.get("initial"))


def _marks(marks: jax.Array) -> jax.Array:
    """The kernels' marks (b, n, 5, 64). Documents are numbered within a chunk: small numbers, which fp32 holds
    exactly."""
    b, _, t = marks.shape
    rows = marks.reshape(b, -1, t // CHUNK, CHUNK)
    segments = rows[:, SEGMENT]
    changes = jnp.concatenate([jnp.zeros_like(segments[..., :1]), segments[..., 1:] != segments[..., :-1]], axis=-1)
    documents = jnp.cumsum(changes, axis=-1)
    as_keys = jnp.where(rows[:, KEY_SEGMENT] >= 0, documents, -1)
    return jnp.stack([rows[:, READS], rows[:, WRITES], rows[:, KEEPS], documents, as_keys], axis=2).astype(jnp.float32)


def _maps(key_dim: int, features: int) -> list[jax.Array]:
    """MAPS: the matrices that pick a feature's factors, transposed; the ones; the order of tokens."""
    constants = selections(key_dim, features)
    squares = np.all(constants.left == constants.right, axis=0) & (constants.left.sum(axis=0) > 0)
    maps = [np.where(squares, 0.5, 1.0) * constants.left, constants.left, constants.right]
    padded = [np.pad(x.T, ((0, 0), (0, KEY_COLUMNS - key_dim)))[None] for x in maps]
    ones = np.stack([constants.left_one, constants.right_one])
    return [
        *(jnp.asarray(x, jnp.bfloat16) for x in padded),
        jnp.asarray(ones, jnp.float32),
        jnp.arange(CHUNK, dtype=jnp.int32)[None],
    ]


@functools.cache
def _weights(key_dim: int) -> np.ndarray:
    """(features,): what the kernels' features lack to be the packed ones."""
    weights = selections(key_dim, count(key_dim)).weight.astype(np.float32)
    weights[0] = 1
    return weights


def _apart(state: jax.Array | None, normalise: bool) -> tuple[jax.Array | None, jax.Array | None]:
    """The value columns as the kernels have them, and the normaliser's (b, h, features)."""
    if state is None:
        return None, None
    weights = _weights(_key_dim(state.shape[2]))[:, None]
    return (state[..., :-1] / weights, state[..., -1]) if normalise else (state / weights, None)


def _key_dim(features: int) -> int:
    return next(size for size in range(1, features) if count(size) == features)


def _joined(columns: jax.Array, normaliser: jax.Array | None, key_dim: int, value_dim: int) -> jax.Array:
    state = columns[:, :, : count(key_dim), :value_dim] * _weights(key_dim)[:, None]
    return state if normaliser is None else jnp.concatenate([state, normaliser[..., None]], axis=-1)


def _between(q, k, normaliser, marks, settings: TaylorSettings) -> tuple[jax.Array, jax.Array]:
    """The sums of weights (b, h, t) that come from before each token's chunk, and the normaliser (b, h, features)
    after the last one."""
    b, t, h, key_dim = q.shape
    n = t // CHUNK
    q, k = (
        jnp.concatenate([jnp.ones_like(x[..., :1]), x], axis=-1).reshape(b, n, CHUNK, h, key_dim + 1)
        for x in (settings.scale * q, k)
    )
    reads, writes, keeps = (
        (None, None, None)
        if marks is None
        else (marks[:, row].reshape(b, n, CHUNK, 1, 1) for row in (READS, WRITES, KEEPS))
    )
    product = functools.partial(jnp.einsum, precision="highest")
    moments = product("bnchi,bnchj->bnhij", k if writes is None else k * writes, k)
    unpack = _unpacking(key_dim)
    size = (b, 1, h, key_dim + 1, key_dim + 1)
    first = jnp.zeros(size, q.dtype) if normaliser is None else product("bhf,fm->bhm", normaliser, unpack).reshape(size)
    if keeps is None:
        through = jnp.cumsum(jnp.concatenate([first, moments], axis=1), axis=1)
    else:
        kept = jnp.concatenate([jnp.ones((b, 1, 1, 1, 1), q.dtype), keeps[:, :, 0, :, :, None].astype(q.dtype)], axis=1)

        def joined(early, late):
            return early[0] * late[0], early[1] * late[0] + late[1]

        _, through = jax.lax.associative_scan(joined, (kept, jnp.concatenate([first, moments], axis=1)), axis=1)
    before, last = through[:, :-1], through[:, -1]
    whole = jnp.sum(product("bnchi,bnhij->bnchj", q, before) * q, axis=-1)
    sums = 0.5 * (whole + before[:, :, None, :, 0, 0])
    if reads is not None:
        sums = sums * reads[..., 0]
    # Each feature is one moment, once: the transpose would count products of two different numbers twice.
    pack = (unpack != 0) / np.maximum((unpack != 0).sum(axis=1, keepdims=True), 1) / np.where(unpack != 0, unpack, 1)
    packed = product("bhm,mf->bhf", last.reshape(b, h, -1), pack.T.astype(np.float32))
    return jnp.moveaxis(sums.reshape(b, t, h), 1, 2), packed


@functools.cache
def _unpacking(key_dim: int) -> np.ndarray:
    """(features, (k + 1)^2): the matrix of moments, flat, of a packed normaliser."""
    rows, columns = np.triu_indices(key_dim)
    weights = _weights(key_dim)
    unpack = np.zeros((count(key_dim), key_dim + 1, key_dim + 1), np.float32)
    unpack[0, 0, 0] = 1
    linear, pairs = 1 + np.arange(key_dim), 1 + key_dim + np.arange(len(rows))
    unpack[linear, 0, linear] = unpack[linear, linear, 0] = 1 / weights[linear]
    unpack[pairs, 1 + rows, 1 + columns] = unpack[pairs, 1 + columns, 1 + rows] = 1 / weights[pairs]
    return unpack.reshape(count(key_dim), -1)
