"""jax-linear-attention (PyPI): its Mosaic GPU kernels on Hopper or, where kernels are simulated, its plain JAX.

What it calls simple_gla (a decay per head, or none) and gla (per channel) serve recurrences that erase nothing. Those
that erase are its rwkv7, S_t = Diag(exp g_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T, with b = u and a = -exp(g) e,
or -e where the undecayed state is erased from. Its kernels for Gated DeltaNet and KDA take the strength separately from
the key, which `erase_read` does not give.

Its documents restart wherever the segment changes, and the initial state is always that of the first token's document.
So padding takes the segment before it, and a state of another document is zeroed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.dispatch import Refusal, interpretation
from recollect.pallas_kernels.linear_recurrence.recurrence import (
    DIMENSIONS,
    ONE_STATE,
    Recurrence,
    by_channel,
    repeat_heads,
    with_strength,
    without_padding,
)
from recollect.pallas_kernels.sharding import over_mesh

HEAD_SIZES = (64, 128)
COLUMNS = 128


@functools.partial(over_mesh, arguments={"inputs": DIMENSIONS}, results=("b t h v", "b h k v"))
def linear_recurrence(
    inputs: Recurrence, *, return_state: bool = False, chunk_size: None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes `linear_recurrence` where `refuses` returns None."""
    from jla.ops import linear_attention

    out_dtype, initial_state = inputs.v.dtype, inputs.initial_state
    inputs = without_padding(inputs)
    b, t, h, _ = inputs.v.shape
    q, k = (repeat_heads(x, h) for x in (inputs.q, inputs.k))
    erase, segments = inputs.erase_read, inputs.segment_ids
    g = jnp.zeros((1, 1, 1, 1)) if inputs.log_decay is None else by_channel(inputs.log_decay, jnp.float32)
    if g.shape[-1] == 1 and erase is None:
        kind, decay = "simple_gla", jnp.broadcast_to(g[..., 0], (b, t, h))
    else:
        kind, decay = "gla" if erase is None else "rwkv7", jnp.broadcast_to(g, q.shape)
    if erase is None:
        gates = {"g": decay}
    else:
        a = -erase.astype(jnp.float32) * (1.0 if inputs.erase_before_decay else jnp.exp(decay))
        gates = {"w": decay, "a": a, "b": k if inputs.erase_write is None else inputs.erase_write}
    if segments is not None and initial_state is not None:
        continues = (segments[:, 0] == inputs.initial_segment)[:, None, None, None]
        initial_state = jnp.where(continues, initial_state, 0)
    o, state = linear_attention(
        kind,
        q,
        k,
        with_strength(inputs).v,
        **gates,
        scale=inputs.scale,
        initial_state=initial_state,
        segment_ids=segments,
        output_final_state=return_state,
        impl="mosaic_gpu" if interpretation() is None else "chunked",
    )
    return o.astype(out_dtype), state


def refuses(inputs: Recurrence, *, chunk_size: int | None = None, **_) -> Refusal:
    """Returns why it cannot serve this call where it can run; None if it can."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if inputs.by_document:
        return ONE_STATE
    if inputs.value_log_decay is not None:
        return "it decays the state's rows, not its columns (value_log_decay)"
    if chunk_size is not None:
        return f"its kernels choose their chunks; chunk_size is {chunk_size}"
    dtypes = {x.dtype for x in (q, k, v)}
    if jnp.dtype(jnp.float64) in dtypes:
        return "it computes in fp32; these are float64"
    if interpretation() is not None:
        return None
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        return f"its kernels take bfloat16; these are {', '.join(sorted(x.name for x in dtypes))}"
    if k.shape[3] not in HEAD_SIZES or v.shape[3] not in HEAD_SIZES:
        return f"its kernels take keys and values of 64 or 128 channels; these are {k.shape[3]} and {v.shape[3]}"
    channels = v.shape[2] * k.shape[3]
    if inputs.decay == "key" and inputs.erase_read is None and channels % COLUMNS:
        return f"with decays per channel its kernels take multiples of 128 channels in all heads; these are {channels}"
    return None
