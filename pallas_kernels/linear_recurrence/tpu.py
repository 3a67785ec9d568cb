"""The scans of chunk_scan.py as Mosaic TPU kernels.

One program goes through the chunks of a few heads, with their states (k, v) fp32 in vector memory; batch rows and
groups of heads run in any order. Rows stay as the layers have them, (b, t, h, d), read as (b, t, h d): a block is the
rows of one chunk and of as many heads as fill whole lanes, so nothing is transposed or padded in memory. Where only all
heads together would do and those do not fit, rows are transposed to (b, h, t, d) first. One number per token, (b, h,
t), is stored as rows of c lanes; a column would take 128 times its size.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recollect.pallas_kernels import mosaic_tpu
from recollect.pallas_kernels.linear_recurrence import tpu_blocks, tpu_chunk
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks, ScanKernels, ScanResult
from recollect.pallas_kernels.linear_recurrence.recurrence import Decay
from recollect.pallas_kernels.linear_recurrence.tpu_chunk import BASE, ScanKind
from recollect.pallas_kernels.linear_recurrence.tpu_inverse import solve, solve_transposed

LARGEST_HEAD = 256


def refuses(key_dim: int, value_dim: int, dtype: jax.typing.DTypeLike, decay: Decay, erase: bool) -> str | None:
    """Returns why these kernels cannot serve heads of key_dim and value_dim in dtype; None if they can."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"the TPU kernels take bfloat16 and float32; this is {jnp.dtype(dtype).name}"
    if max(key_dim, value_dim) > LARGEST_HEAD:
        return f"the TPU kernels take head sizes up to {LARGEST_HEAD}; these are {key_dim} and {value_dim}"
    return None


def chunk_size(decay: Decay, erase: bool, key_dim: int, value_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """Returns the tokens per chunk: 128 fill the matrix unit; erasing also takes an inverse c x c, c^2 work per
    token."""
    return 64 if erase else 128


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
) -> ScanResult:
    """See chunk_scan.ChunkScan.

    Raises:
      ValueError: chunks of a size these kernels do not have, or an operand's shape does not fit.
    """
    rows = {"q": q, "k": k, "v": v}
    if dot_with is not None:
        rows["dot_with"] = dot_with
    kind = ScanKind(chunks.size, chunks.decay, reverse, strict, float(scale))
    return _scan(rows, chunks, kind, heads, initial_state, checkpoint_every, jnp.dtype(out_dtype or v.dtype))


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
    """See chunk_scan.DeltaScan.

    Raises:
      ValueError: a decay on the channels of v, chunks of a size these kernels do not have, or an operand's shape does
        not fit.
    """
    if chunks.decay == "value":
        raise ValueError("delta_scan: a decay on the channels of v is not served")
    rows = {"w": w, "k": k, "v": u}
    if q is not None:
        rows["q"] = q
    if second is not None:
        rows |= {"second_k": second[0], "second_v": second[1]}
    kind = ScanKind(chunks.size, chunks.decay, reverse, False, float(scale))
    return _scan(rows, chunks, kind, heads, initial_state, checkpoint_every, jnp.dtype(u.dtype), keeps_y)


def _scan(
    rows: dict[str, jax.Array],
    chunks: Chunks,
    kind: ScanKind,
    heads: int,
    initial_state,
    every: int | None,
    out_dtype,
    keeps_y=False,
) -> ScanResult:
    b, t, _, value_dim = rows["v"].shape
    key_dim, c = rows["k"].shape[3], chunks.size
    n = t // c
    new_rows = dict.fromkeys((["o"] if "q" in rows else []) + (["y"] if keeps_y else []), (value_dim, out_dtype))
    layout = tpu_blocks.BlockLayout.of(rows, new_rows, chunks, heads, kind.reverse)
    inputs = layout.inputs(chunks)
    if initial_state is not None:
        inputs.append(("initial_state", *layout.state(initial_state.astype(jnp.float32))))
    outputs = [(name, *layout.new_rows(*like)) for name, like in new_rows.items()]
    if "dot_with" in rows:
        outputs.append(("dots", *layout.new_per_token()))
    outputs.append(("last_state", *layout.new_state(key_dim, value_dim)))
    if every is not None:
        outputs.append(("checkpoints", *layout.new_checkpoints(key_dim, value_dim, -(-n // every), every)))
    kind = dataclasses.replace(kind, heads=layout.side_by_side(key_dim, value_dim))
    packs, group = layout.groups.group // kind.heads, layout.groups.group
    results = mosaic_tpu.call(
        functools.partial(_kernel, kind=kind, layout=layout, every=every),
        inputs,
        outputs,
        grid=(b, heads // group, n),
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        scratch=[pltpu.VMEM((packs, kind.heads * key_dim, kind.heads * value_dim), jnp.float32)],
        **_cost(b * heads * n, kind, rows, key_dim, value_dim),
        name="_".join(
            ("recurrence", "delta" if "w" in rows else "scan", kind.decay, *(["reverse"] if kind.reverse else []))
        ),
    )
    results |= {name: layout.as_rows(results[name], value_dim) for name in new_rows}
    return ScanResult(
        o=results.get("o"),
        state=results["last_state"],
        dots=results["dots"].reshape(b, heads, t) if "dots" in results else None,
        checkpoints=results.get("checkpoints"),
        y=results.get("y"),
    )


def _kernel(ref, state, *, kind: ScanKind, layout: tpu_blocks.BlockLayout, every: int | None) -> None:
    step, n, group = pl.program_id(2), pl.num_programs(2), layout.groups.group
    at = n - 1 - step if kind.reverse else step

    @pl.when(step == 0)
    def _():
        if "initial_state" not in ref or kind.heads > 1:
            state[...] = jnp.zeros_like(state)
        if "initial_state" in ref:
            for head in range(group):
                state[_state_of(state, head, kind.heads)] = ref["initial_state"][0, head]

    if every is not None:
        entry = lax.rem(at, every) == (every - 1 if kind.reverse else 0)

        @pl.when((step == 0) | entry)
        def _():
            for head in range(group):
                ref["checkpoints"][0, head, 0] = state[_state_of(state, head, kind.heads)]

    documents = tpu_blocks.documents(ref) if "segments" in ref else None
    raw: dict[tuple[int, int], list[jax.Array]] = {}
    for pack in range(group // kind.heads):
        _some_heads(ref, state, pack, kind, layout, documents, raw)

    @pl.when(step == n - 1)
    def _():
        for head in range(group):
            ref["last_state"][0, head] = state[_state_of(state, head, kind.heads)]


def _state_of(state, head: int, heads: int) -> tuple[int, slice, slice]:
    """Where in the states at work, (packs, heads k, heads v), one head's is."""
    key_dim, value_dim = state.shape[1] // heads, state.shape[2] // heads
    pack, at = divmod(head, heads)
    return pack, slice(at * key_dim, (at + 1) * key_dim), slice(at * value_dim, (at + 1) * value_dim)


def _some_heads(ref, state, pack: int, kind: ScanKind, layout: tpu_blocks.BlockLayout, documents, raw) -> None:
    first = pack * kind.heads
    of = functools.partial(layout.heads_of, ref, first=first, count=kind.heads)
    k, written, entered = of("k"), of("v"), state[pack]
    total = layout.totals(ref, first, kind)
    weights = tpu_chunk.weights(kind, total, documents, written.shape[1] // kind.heads)
    lanes = pl.ds(pack * written.shape[1], written.shape[1])
    if "w" in ref:
        y = written.astype(jnp.float32) - tpu_chunk.from_state(of("w"), entered)
        if "y" in ref:
            ref["y"][0, :, lanes] = y.astype(ref["y"].dtype)
        written = y.astype(written.dtype)
    if "o" in ref:
        q = of("q")
        pair = layout.position("q", first), layout.position("k", first)
        if kind.decay != "key" and pair not in raw:
            raw[pair] = tpu_chunk.products(kind, q, k)
        out = tpu_chunk.read(kind, weights, q, k, written, entered, raw.get(pair))
        ref["o"][0, :, lanes] = out.astype(ref["o"].dtype)
        if "dot_with" in ref:
            for at, dots in enumerate(tpu_chunk.row_sums(out * of("dot_with").astype(jnp.float32), kind.heads)):
                ref["dots"][0, first + at, 0] = tpu_chunk.as_row(dots)
    update = tpu_chunk.outer(kind, weights, k, y if "w" in ref else written)
    if "second_k" in ref:
        update = update + kind.scale * tpu_chunk.outer(kind, weights, of("second_k"), of("second_v"))
    state[pack] = update + (entered if weights.keep is None else weights.keep * entered)


def _cost(programs: int, kind: ScanKind, rows, key_dim: int, value_dim: int) -> dict[str, int]:
    c = kind.size
    levels = 1 + int(math.log2(max(c, BASE) // BASE)) if kind.decay in ("key", "value") else 1
    products = 2 * c * key_dim * value_dim * (1 + ("w" in rows) + ("second_k" in rows) + ("q" in rows))
    if "q" in rows:
        by_key, by_value = (levels if kind.decay == name else 1 for name in ("key", "value"))
        products += 2 * c * c * (key_dim * by_key + value_dim * by_value)
    channels = {"none": 0, "head": c, "key": (levels + 3) * key_dim, "value": (levels + 3) * value_dim}[kind.decay]
    return {"flops": programs * products, "transcendentals": programs * c * channels}


KERNELS = ScanKernels(scan, delta_scan, solve, solve_transposed, chunk_size, refuses)
