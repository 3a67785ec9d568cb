"""What of the recurrence is measured on a device: tokens a chunk on TPUs, spans of time on GPUs (their chunk is
fixed)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence import gpu, linear_recurrence, tpu
from recollect.pallas_kernels.tuning import Key, Sizes
from recollect.pallas_kernels.tuning.measure import Tunable


def _build(key: Key, backend: str):
    """Forward and gradient of a recurrence of this key, on kernels and without."""
    b, t, h, k, v = (
        int(key.get(name, given)) for name, given in (("b", 4), ("t", 4096), ("h", 16), ("k", 64), ("v", 64))
    )
    k = k if "k" in key else v
    dtype = jnp.dtype(str(key.get("dtype", "bfloat16")))
    keys = jax.random.split(jax.random.key(0), 5)
    given: dict[str, Any] = {
        "q": jax.random.normal(keys[0], (b, t, h, k)),
        "k": jax.random.normal(keys[1], (b, t, h, k)),
        "v": jax.random.normal(keys[2], (b, t, h, v)),
    }
    given["k"] /= jnp.linalg.norm(given["k"], axis=-1, keepdims=True)
    if key.get("erase"):
        given["erase_read"] = jax.nn.sigmoid(jax.random.normal(keys[4], (b, t, h, 1))) * given["k"]
    given = {name: x.astype(dtype) for name, x in given.items()}
    if key.get("decay", "none") != "none":
        shape = (b, t, h) if key["decay"] == "head" else (b, t, h, k)
        given["log_decay"] = jax.nn.log_sigmoid(jax.random.normal(keys[3], shape) + 3)

    def on(name: str):
        def loss(x):
            return jnp.sum(jnp.sin(linear_recurrence(**x, scale=k**-0.5, backend=name)[0].astype(jnp.float32)))

        return jax.value_and_grad(loss)

    return on(backend), on("xla"), (given,)


def _chunk(decay: str, erase: bool, k: int, v: int, dtype: str) -> Sizes:
    return {"chunk": tpu.chunk_size(decay, erase, k, v, dtype)}  # type: ignore[arg-type]


def _spans(b: int, t: int, h: int, v: int) -> Sizes:
    return {"spans": gpu.spans_to_fill(b * h * -(-v // 64), t)}


def _span_candidates(key: Key) -> Iterable[Sizes]:
    return [{"spans": count} for count in (1, 2, 4, 8, 16, 32) if count * 512 <= int(key["t"])]


TUNABLES = [
    Tunable(
        kernel="linear_recurrence.tpu_chunk",
        platform="tpu",
        keys=[
            {"decay": decay, "erase": erase, "k": size, "v": size, "dtype": "bfloat16"}
            for decay in ("none", "head", "key")
            for erase in (False, True)
            for size in (64, 128)
        ],
        heuristic=_chunk,
        candidates=lambda key: [{"chunk": chunk} for chunk in (64, 128, 256)],
        build=lambda key: _build(key, "pallas_tpu"),
    ),
    Tunable(
        kernel="linear_recurrence.gpu_spans",
        platform="gpu",
        keys=[{"b": 1, "t": t, "h": h, "v": v} for t in (4096, 16384, 65536) for h in (1, 4, 16) for v in (64, 128)],
        heuristic=_spans,
        candidates=_span_candidates,
        build=lambda key: _build(key, "pallas_gpu"),
    ),
]
