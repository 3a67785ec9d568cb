"""The walks of chunk_scan.py as Mosaic GPU kernels, for NVIDIA Hopper.

A thread block walks over all chunks of one batch row and head, for 64 or 32 of the state's columns; blocks that differ
in columns alone are neighbours in the grid, so that they share q and k in the second-level cache. How they work is said
in gpu_body.py.

Few rows and heads would leave most cores idle: then time is cut in spans. A first launch finds the state that each
span adds, reading neither q nor what enters; those are combined (sequence_parallel.entering_states), and a second launch walks all
spans side by side from true states.

Not served: fp32 (tensor cores of Hopper transpose 16-bit operands only), and sizes above `LARGEST`, whose work does not
fit on chip.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.linear_recurrence import gpu_body, gpu_inverse
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks, ScanKernels, ScanResult, Solution
from recollect.pallas_kernels.linear_recurrence.gpu_decay import MARKED
from recollect.pallas_kernels.linear_recurrence.gpu_plan import CHUNK, KEYED, READS, TOTAL, WRITES, ScanPlan
from recollect.pallas_kernels.linear_recurrence.recurrence import Decay
from recollect.pallas_kernels.linear_recurrence.sequence_parallel import entering_states
from recollect.pallas_kernels.tuning import block_sizes

LARGEST = {
    "none": 256,
    "head": 256,
    "key": 192,
    "value": 256,
}  # key size of a walk, by decay; values may be of any size

SHORTEST_SPAN = 1024
"""Tokens: below, a span's own work does not hide what combining the spans costs."""
CORES = 132


def chunk_size(decay: Decay, erase: bool, key_dim: int, value_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """Tokens a chunk, the only count these kernels are written for: the rows of a tensor core instruction."""
    return CHUNK


def refuses(key_dim: int, value_dim: int, dtype: jax.typing.DTypeLike, decay: Decay, erase: bool) -> str | None:
    """Why these kernels cannot serve a recurrence of such heads, forwards and backwards; None if they can."""
    missing = gpu.unavailable()
    if missing:
        return missing
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"its products take bfloat16; this is {jnp.dtype(dtype)}"
    if erase and decay == "value":
        return "the delta rule decays by head or by key channel"
    # The gradients walk with keys in place of values and the other way round.
    turned: dict[Decay, Decay] = {"key": "value", "value": "key"}
    for name, size, acts in (("key", key_dim, decay), ("value", value_dim, turned.get(decay, decay))):
        reason = _too_large(name, size, acts)
        if reason:
            return reason
    return None


def _too_large(name: str, size: int, decay: Decay) -> str | None:
    if size <= LARGEST[decay]:
        return None
    decays = f" beside a decay by {decay} channel" if decay in ("key", "value") else ""
    return f"a {name} size above {LARGEST[decay]} does not fit on chip{decays}; this one is {size}"


def scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chunks: Chunks,
    *,
    heads: int,
    scale: float = 1.0,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    strict: bool = False,
    dot_with: jax.Array | None = None,
    checkpoint_every: int | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    second: tuple[jax.Array, jax.Array] | None = None,
    second_q: jax.Array | None = None,
    second_dot_with: jax.Array | None = None,
    second_scale: float = 1.0,
) -> ScanResult:
    """See chunk_scan.PairedScan. q, k, v, second, second_q and what dots are taken with bf16; out_dtype bf16 or fp32.

    Raises:
      ValueError: a dtype, head size or chunk size that is not served, or second and second_q together or with a decay
        by channel.
    """
    tokens = {"q": q, "k": k, "v": v}
    if second is not None and second_scale != 0:
        tokens |= {"second_k": second[0], "second_v": second[1]}
    more = {"dot_with": dot_with, "second_q": second_q, "second_dot_with": second_dot_with}
    tokens |= {name: x for name, x in more.items() if x is not None}
    joins = second is not None or second_q is not None
    if (joins and chunks.decay not in ("none", "head")) or (second is not None and second_q is not None):
        raise ValueError("linear_recurrence: pallas_gpu takes second or second_q, without a decay by channel")
    return _scan(
        tokens,
        chunks,
        heads,
        scale,
        initial_state,
        reverse,
        strict,
        checkpoint_every,
        out_dtype or v.dtype,
        False,
        second_scale,
    )


def delta_scan(
    w: jax.Array,
    u: jax.Array,
    k: jax.Array,
    chunks: Chunks,
    *,
    heads: int,
    q: jax.Array | None = None,
    second: tuple[jax.Array, jax.Array] | None = None,
    scale: float = 1.0,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    checkpoint_every: int | None = None,
    keeps_y: bool = True,
) -> ScanResult:
    """See chunk_scan.DeltaScan. All of w, u, k, q and second bf16.

    Raises:
      ValueError: a dtype, head size or chunk size that is not served.
    """
    tokens = {"w": w, "k": k, "v": u}
    if q is not None:
        tokens["q"] = q
    if second is not None and scale != 0:
        tokens["second_k"], tokens["second_v"] = second
    return _scan(tokens, chunks, heads, scale, initial_state, reverse, False, checkpoint_every, u.dtype, keeps_y, scale)


def _scan(
    tokens: Mapping[str, jax.Array],
    chunks: Chunks,
    heads: int,
    scale: float,
    initial_state: jax.Array | None,
    reverse: bool,
    strict: bool,
    checkpoint_every: int | None,
    out_dtype: jax.typing.DTypeLike,
    keeps_y: bool,
    second_scale: float,
) -> ScanResult:
    b, t, _, key_dim = tokens["k"].shape
    value_dim = tokens["v"].shape[3]
    _check(tokens, chunks, key_dim)
    keys, values = gpu.round_up(key_dim, 64), gpu.round_up(value_dim, 64)
    plan = ScanPlan(
        b=b,
        t=t,
        heads=heads,
        key_dim=keys,
        value_dim=values,
        decay=chunks.decay,
        reverse=reverse,
        strict=strict,
        scale=scale,
        tokens=tuple(tokens),
        segmented=chunks.segments is not None,
        enters=initial_state is not None,
        keeps_y=keeps_y,
        checkpoint_every=checkpoint_every,
        out_dtype=jnp.dtype(out_dtype),
        second_scale=second_scale,
    )
    plan = _cut(plan, value_dim)
    inputs = {name: gpu.pad_last(array, keys if name in KEYED else values) for name, array in tokens.items()}
    inputs |= _decays(chunks, plan.has_rows, reverse, keys if chunks.decay == "key" else values)
    if initial_state is not None:
        inputs["initial"] = jnp.pad(initial_state, ((0, 0), (0, 0), (0, keys - key_dim), (0, values - value_dim)))
    if plan.spans > 1:
        inputs["initial"] = _entering(plan, inputs, chunks)
        plan = dataclasses.replace(plan, enters=True)
    out = gpu_body.launch(plan, inputs)
    state, value = (..., slice(key_dim), slice(value_dim)), (..., slice(value_dim))
    return ScanResult(
        o=out["o"][value] if "o" in out else None,
        state=out["state"][state],
        dots=jnp.sum(out["dots"], axis=0) if "dots" in out else None,
        checkpoints=out["checkpoints"][state] if "checkpoints" in out else None,
        y=out["y"][value] if "y" in out else None,
        second_o=out["second_o"][value] if "second_o" in out else None,
        second_dots=jnp.sum(out["second_dots"], axis=0) if "second_dots" in out else None,
    )


def spans_to_fill(blocks: int, t: int) -> int:
    """Into how many spans of time a walk of t tokens with so many thread blocks is cut: as many as the cores can
    take at once."""
    return max(1, min(CORES // blocks, t // SHORTEST_SPAN))


def _cut(plan: ScanPlan, value_dim: int) -> ScanPlan:
    """The plan, in as many spans as a tuning table says or fill the device; none is empty."""
    sizes = block_sizes(
        "linear_recurrence.gpu_spans",
        lambda **_: {"spans": spans_to_fill(plan.b * plan.heads * plan.splits, plan.t)},
        b=plan.b,
        t=plan.t,
        h=plan.heads,
        v=value_dim,
    )
    span = -(-plan.n // min(sizes["spans"], plan.n))
    return dataclasses.replace(plan, spans=-(-plan.n // span))


def _entering(plan: ScanPlan, inputs: Mapping[str, jax.Array], chunks: Chunks) -> jax.Array:
    """The states (b, spans, h, k, v) that enter the spans, in the order of the walk."""
    unread = ("q", "dot_with", "second_q", "second_dot_with")
    alone = dataclasses.replace(
        plan,
        tokens=tuple(name for name in plan.tokens if name not in unread),
        enters=False,
        keeps_y=False,
        checkpoint_every=None,
        states_only=True,
    )
    states = gpu_body.launch(alone, {name: x for name, x in inputs.items() if name not in (*unread, "initial")})[
        "state"
    ]
    states, keeps = states[..., : plan.value_dim], states[..., plan.value_dim :]
    if not alone.transition:
        keeps = _keeps(plan, inputs.get("total"), chunks)
    return entering_states(states, keeps, inputs.get("initial"))


def _keeps(plan: ScanPlan, total: jax.Array | None, chunks: Chunks) -> jax.Array:
    """What spans but the last leave of a state that enters them: factors (b, spans - 1, h | 1, k | 1, v | 1).

    Args:
      total: chunks.total with padded channels, if it has any.
    """

    def by_span(x: jax.Array) -> jax.Array:
        x = jnp.flip(x, axis=1) if plan.reverse else x
        return x[:, : (plan.spans - 1) * plan.span].reshape(x.shape[0], plan.spans - 1, plan.span, *x.shape[2:])

    keeps = jnp.ones((plan.b, plan.spans - 1, 1, 1, 1), jnp.float32)
    if plan.decay == "head":
        assert chunks.total is not None
        keeps = jnp.exp(jnp.sum(by_span(jnp.moveaxis(chunks.total[:, :, CHUNK - 1 :: CHUNK], 1, 2)), axis=2))[
            ..., None, None
        ]
    elif total is not None:
        keeps = jnp.exp(jnp.sum(by_span(total[:, CHUNK - 1 :: CHUNK]), axis=2))
        keeps = keeps[..., None] if plan.decay == "key" else keeps[..., None, :]
    if chunks.keeps is not None:
        keeps = keeps * jnp.prod(by_span(chunks.keeps), axis=2)[..., None, None, None]
    return keeps


def solve(
    e: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chunks: Chunks,
    *,
    heads: int,
    strength: jax.Array | None = None,
    log_decay: jax.Array | None = None,
    keeps: bool = True,
) -> Solution:
    """See chunk_scan.Solve. e, k, v bf16; the inverse is (b, heads, t / c, c, c) bf16.

    Raises:
      ValueError: a dtype, head size or chunk size that is not served.
    """
    inputs = {} if strength is None else {"strength": strength.astype(jnp.float32)}
    if log_decay is not None:
        inputs["log_decay"] = gpu.pad_last(log_decay, gpu.round_up(log_decay.shape[3], 64))
    return _solve({"e": e, "k": k, "v": v}, inputs, chunks, heads, keeps=keeps)


def solve_transposed(
    inverse: jax.Array, q: jax.Array, k: jax.Array, do: jax.Array, chunks: Chunks, *, heads: int, scale: float = 1.0
) -> Solution:
    """See chunk_scan.SolveTransposed. All bf16.

    Raises:
      ValueError: a dtype, head size or chunk size that is not served.
    """
    return _solve({"q": q, "k": k, "do": do}, {"inverse": inverse}, chunks, heads, scale=scale)


def _solve(
    tokens: Mapping[str, jax.Array],
    more: Mapping[str, jax.Array],
    chunks: Chunks,
    heads: int,
    *,
    keeps: bool = False,
    scale: float = 1.0,
) -> Solution:
    b, t, _, key_dim = tokens["k"].shape
    value_dim = tokens["do" if "do" in tokens else "v"].shape[3]
    _check(tokens, chunks, key_dim, value_dim)
    keys, values = gpu.round_up(key_dim, 64), gpu.round_up(value_dim, 64)
    weighted = chunks.decay == "head" or chunks.segments is not None
    plan = gpu_inverse.InversePlan(
        b=b,
        t=t,
        heads=heads,
        key_dim=keys,
        value_dim=values,
        decay=chunks.decay,
        tokens=tuple(tokens),
        weighted=weighted,
        segmented=chunks.segments is not None,
        has_strength="strength" in more,
        sums="log_decay" in more,
        keeps=keeps,
        scale=scale,
    )
    inputs = {name: gpu.pad_last(array, keys if name in gpu_inverse.KEYS else values) for name, array in tokens.items()}
    inputs |= {**more} | _decays(chunks, weighted, False, keys)
    made = gpu_inverse.launch(plan, inputs)
    total = made["total"][..., :key_dim] if "total" in made else None
    return Solution(made["w"][..., :key_dim], made["u"][..., :value_dim], made.get("inverse"), total)


def _check(tokens: Mapping[str, jax.Array], chunks: Chunks, key_dim: int, value_dim: int = 1) -> None:
    for name, array in tokens.items():
        reason = refuses(1, value_dim, array.dtype, chunks.decay, bool(tokens.keys() & {"e", "w", "do"})) or _too_large(
            "key", key_dim, chunks.decay
        )
        if reason:
            raise ValueError(f"linear_recurrence: pallas_gpu cannot serve {name}: {reason}")
    if chunks.size != CHUNK:
        raise ValueError(f"linear_recurrence: pallas_gpu walks in chunks of {CHUNK}; these are of {chunks.size}")


def _decays(chunks: Chunks, weighted: bool, reverse: bool, channels: int) -> dict[str, jax.Array]:
    """Inputs that say how tokens weigh on each other; channels: of a decay by channel, padded."""
    inputs = {"rows": weight_rows(chunks, reverse)} if weighted else {}
    if chunks.segments is not None:
        inputs["segments"] = chunks.segments
    if chunks.total is not None and chunks.decay in ("key", "value"):
        b, t, heads, _ = chunks.total.shape
        inputs["total"] = gpu.pad_last(chunks.total, channels)
        # Every eighth token again: what the exponents of a chunk's blocks are counted from, copied by its stride.
        inputs["marks"] = inputs["total"].reshape(b, t // MARKED, MARKED, heads, channels)
    return inputs


@functools.partial(jax.jit, static_argnames="reverse")
def weight_rows(chunks: Chunks, reverse: bool) -> jax.Array:
    """(b, h | 1, n, 4, c) fp32, for each chunk and token: the running total (0 where it has channels), reads, writes,
    and the chunk's keep.

    Decays by channel are left out of all four.
    """
    c = chunks.size
    if chunks.decay == "head" and chunks.total is not None:
        total = chunks.total.reshape(*chunks.total.shape[:2], -1, c)
    else:
        assert chunks.segments is not None
        total = jnp.zeros((chunks.segments.shape[0], 1, chunks.segments.shape[1] // c, c), jnp.float32)
    b, _, n, _ = total.shape
    total, last = total[..., None, :], total[..., None, -1:]
    row = jnp.arange(4)[:, None]
    to_start, to_end = (WRITES, READS) if reverse else (READS, WRITES)
    # One expression, so that one launch makes it.
    weights = jnp.exp(jnp.where(row == to_start, total, last - jnp.where(row == to_end, total, 0)))
    if chunks.starts is not None and chunks.ends is not None and chunks.keeps is not None:
        starts, ends = (x.reshape(b, 1, n, 1, c) for x in (chunks.starts, chunks.ends))
        starts, ends = (ends, starts) if reverse else (starts, ends)
        weights = weights * jnp.where(
            row == READS, starts, jnp.where(row == WRITES, ends, chunks.keeps.reshape(b, 1, n, 1, 1))
        )
    return jnp.where(row == TOTAL, total, weights)


KERNELS = ScanKernels(scan, delta_scan, solve, solve_transposed, chunk_size, refuses, paired_scan=scan)
