"""What of Taylor attention is measured on a device: pieces of time on GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.gpu import spans_to_fill
from recollect.pallas_kernels.taylor_attention import taylor_attention
from recollect.pallas_kernels.tuning import Key, Sizes
from recollect.pallas_kernels.tuning.measure import Tunable

KEY_DIM = 16


def _build(key: Key):
    """Forward and gradient at this key, on kernels and without."""
    b, t, h, v = (int(key[name]) for name in ("b", "t", "h", "v"))
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((b, t, h, KEY_DIM), (b, t, h, KEY_DIM), (b, t, h, v))
    arrays = tuple(jax.random.normal(one, size).astype(jnp.bfloat16) for one, size in zip(keys, sizes, strict=True))

    def on(name: str):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(taylor_attention(q, k, v, backend=name)[0].astype(jnp.float32)))

        return jax.value_and_grad(loss, (0, 1, 2))

    return on("pallas_gpu"), on("xla"), arrays


def _pieces(b: int, t: int, h: int, v: int) -> Sizes:
    return {"pieces": spans_to_fill(b * h * -(-v // 64), t)}


TUNABLES = [
    Tunable(
        kernel="taylor_attention.gpu_spans",
        platform="gpu",
        keys=[{"b": b, "t": t, "h": 16, "v": v} for b, t in ((1, 4096), (2, 8192), (1, 16384)) for v in (64, 128)],
        heuristic=_pieces,
        candidates=lambda key: [{"pieces": count} for count in (1, 2, 4, 8, 16) if count * 512 <= int(key["t"])],
        build=_build,
    ),
]
