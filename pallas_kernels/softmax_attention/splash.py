"""jax's splash attention (jax.experimental.pallas.ops.tpu.splash_attention): causal or windowed self-attention on TPUs,
documents and sinks too.

It visits those blocks of the mask that are not empty, forward and backward, dk and dv separately from dq, so the work
grows with the window; all sums are in fixed order. It takes heads before tokens, whole blocks and scaled queries, which
this module prepares. What is refused, and why:

- fp32: no precision can be asked of its products, which on a TPU round fp32 operands to bf16;
- masks, and windows counted in positions: its masks are made of places in storage when the program is traced;
- the log-sum-exp: with it, the library has no gradient;
- short sequences, of which a block of 128 by 128 would be padding for the most part.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.sharding import over_mesh

LANES = 128
FEWEST_TOKENS, MOST_TOKENS = 256, 16384
"""The library looks at every number of the mask, t * t, when it makes a kernel: 1 to 3 s at 16,384 tokens, once a
process and shape."""

LARGEST_HEAD = 256
BLOCKS = (512, 256, 128)
MOST_PADDING = 1 / 8
"""Share of a sequence by which it may grow for a larger block."""


def softmax_attention(q, k, v, *, window, sinks, query_segments, scale, **rest) -> tuple[jax.Array, None]:
    """Returns the output and no log-sum-exp; arguments as those of the public function."""
    interpret = _interpret()

    def run(q, k, v, sinks, segments):
        return _on_device(q, k, v, sinks, segments, window=window, scale=float(scale), interpret=interpret)

    letters = {"q": "b t h k", "k": "b s h k", "v": "b s h v", "sinks": "h", "segments": "b t"}
    return over_mesh(run, letters, "b t h v")(q, k, v, sinks, query_segments), None


def refuses(
    q,
    k,
    v,
    *,
    window,
    mask,
    sinks,
    bias,
    dropout,
    query_positions,
    key_positions,
    query_segments,
    key_segments,
    return_lse,
    **rest,
) -> str | None:
    """Returns why it cannot serve a call, or None."""
    if _library() is None:
        return f"jax {jax.__version__} has no splash attention where it was until 0.11"
    if mask is not None:
        return "it takes no masks"
    if bias is not None:
        return "it takes no bias of scores"
    if dropout is not None:
        return "it takes no dropout of weights"
    if q.shape[1] != k.shape[1] or query_positions is not key_positions or query_segments is not key_segments:
        return "it attends within one sequence only"
    if window is not None and query_positions is not None:
        return "it counts windows in stored tokens, not in positions"
    if return_lse:
        return "its log-sum-exp has no gradient"
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"it takes bfloat16; got {q.dtype}, {k.dtype}, {v.dtype}"
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        return f"it takes heads of at most {LARGEST_HEAD}; got {q.shape[3]} and {v.shape[3]}"
    if not FEWEST_TOKENS <= q.shape[1] <= MOST_TOKENS:
        return f"it takes {FEWEST_TOKENS} to {MOST_TOKENS} tokens; got {q.shape[1]}"
    return None


def block_sizes(t: int, window: int | None) -> tuple[int, int]:
    """Tokens a block, and the length that the sequence is padded to."""
    for block in BLOCKS:
        length = t + -t % block
        # A block far larger than the window computes mostly what the mask then hides.
        if length - t <= MOST_PADDING * t and (window is None or block <= max(window, LANES)):
            return block, length
    return LANES, t + -t % LANES


def _on_device(q, k, v, sinks, segments, *, window, scale, interpret) -> jax.Array:
    t, h = q.shape[1:3]
    if segments is not None:
        real = (segments != 0)[:, :, None, None]
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    block, length = block_sizes(t, window)
    # Keys after the end are after every query that is kept, so causality hides them.
    q, k, v = (jnp.pad(x, ((0, 0), (0, length - t), (0, 0), (0, 0))) for x in (q, k, v))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in ((q.astype(jnp.float32) * scale).astype(q.dtype), k, v))
    ids = None
    if segments is not None:
        # Padding sees itself, as a softmax over nothing would divide by zero.
        segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, length - t)))
        ids = _library()[0].SegmentIds(segments, segments)
    kernel = _kernel(h, length, None if window is None or window >= t else window, block, interpret)

    def row(x):
        return kernel(*x, None if sinks is None else _of_wide_gradient(sinks.astype(jnp.float32)))

    # The simulator that looks for races does not know kernels under vmap.
    o = (jax.vmap(row) if isinstance(interpret, bool) else functools.partial(jax.lax.map, row))((q, k, v, ids))
    o = jnp.swapaxes(o, 1, 2)[:, :t]
    return o if segments is None else jnp.where(real, o, 0)


@jax.custom_vjp
def _of_wide_gradient(sinks: jax.Array) -> jax.Array:
    """fp32 logits as they are; the library gives their gradient in the outputs' dtype, which jax does not always
    take for theirs."""
    return sinks


_of_wide_gradient.defvjp(lambda sinks: (sinks, None), lambda _, gradient: (gradient.astype(jnp.float32),))


@functools.lru_cache(maxsize=64)
def _kernel(h: int, t: int, window: int | None, block: int, interpret: Any) -> Any:
    """Kept, as each new one would be traced and compiled anew; its arrays are numpy's, so that they belong to no
    device and no trace."""
    kernels, masks = _library()
    if window is None:
        mask: Any = masks.CausalMask((t, t))
    else:
        mask = masks.LocalMask((t, t), (window - 1, 0), 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * h),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, kernel)


@functools.cache
def _library() -> Any:
    """Imports and returns its modules of kernels and of masks; None where this jax has none."""
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
    except ImportError:
        return None
    return splash_attention_kernel, splash_attention_mask


def _interpret() -> Any:
    how = dispatch.interpretation()
    if how == "races":
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.InterpretParams(detect_races=True)
    return how == "values"
