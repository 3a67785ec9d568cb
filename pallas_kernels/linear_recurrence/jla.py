"""jax-linear-attention (PyPI): its Mosaic GPU kernels on Hopper or, where kernels are simulated, its plain-JAX forms.

What it calls simple_gla (a decay per head, or none) and gla (per channel) serve recurrences that erase nothing. Those
that erase are its rwkv7, S_t = Diag(exp g_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T, with b = u and a = -exp(g) e,
or -e where the undecayed state is erased from.
Its kernels for Gated DeltaNet and KDA take the strength apart from the key, which `erase_read` does not give.

Its documents restart wherever the segment changes, and the entering state is always the first token's. So padding takes
the segment before it, and a state of another document is zeroed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.dispatch import Refusal, interpretation
from recollect.pallas_kernels.linear_recurrence import DIMENSIONS
from recollect.pallas_kernels.linear_recurrence.xla import by_channel, carried
from recollect.pallas_kernels.sharding import over_mesh

HEAD_SIZES = (64, 128)
COLUMNS = 128


@functools.partial(over_mesh, arguments=DIMENSIONS, results=("b t h v", "b h k v"))
def linear_recurrence(
    q,
    k,
    v,
    *,
    log_decay=None,
    value_log_decay=None,
    write_strength=None,
    erase_read=None,
    erase_write=None,
    erase_before_decay=False,
    scale=1.0,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=False,
    chunk_size=None,
) -> tuple[jax.Array, jax.Array | None]:
    """See linear_recurrence for the arguments; it is called where `refuses` returns None."""
    from jla.ops import linear_attention

    b, t, h, _ = v.shape
    q, k = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (q, k))
    g = jnp.zeros((1, 1, 1, 1)) if log_decay is None else by_channel(log_decay, jnp.float32)
    if g.shape[-1] == 1 and erase_read is None:
        kind, decay = "simple_gla", jnp.broadcast_to(g[..., 0], (b, t, h))
    else:
        kind, decay = "gla" if erase_read is None else "rwkv7", jnp.broadcast_to(g, q.shape)
    rows = {"q": q, "k": k, "v": v}
    if erase_read is None:
        rows["g"] = decay
    else:
        a = -erase_read.astype(jnp.float32) * (1.0 if erase_before_decay else jnp.exp(decay))
        rows |= {"w": decay, "a": a, "b": k if erase_write is None else erase_write}
    if write_strength is not None:
        rows["strength"] = by_channel(write_strength, jnp.float32)
    segments = None
    if segment_ids is not None:
        real = segment_ids != 0
        rows = {name: jnp.where(real.reshape(b, t, *[1] * (x.ndim - 2)), x, 0) for name, x in rows.items()}
        segments = carried(segment_ids, jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment)
        if initial_state is not None:
            continues = (segments[:, 0] == initial_segment)[:, None, None, None]
            initial_state = jnp.where(continues, initial_state, 0)
    if write_strength is not None:
        rows["v"] = (rows.pop("strength") * rows["v"]).astype(v.dtype)
    o, state = linear_attention(
        kind,
        *(rows.pop(name) for name in "qkv"),
        **rows,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segments,
        output_final_state=return_state,
        impl="mosaic_gpu" if interpretation() is None else "chunked",
    )
    return o.astype(v.dtype), state


def refuses(q, k, v, *, log_decay=None, value_log_decay=None, erase_read=None, chunk_size=None, **_) -> Refusal:
    """Why it cannot serve this call where it can run; None if it can."""
    if value_log_decay is not None:
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
    per_channel = log_decay is not None and log_decay.ndim == 4
    if erase_read is None and per_channel and v.shape[2] * k.shape[3] % COLUMNS:
        return f"with decays per channel its kernels take multiples of 128 channels in all heads; these are {v.shape[2] * k.shape[3]}"
    return None
