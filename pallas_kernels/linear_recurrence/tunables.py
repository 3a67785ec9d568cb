"""Sizes of the recurrence that are measured on a device: tokens per chunk on TPUs, spans of time on GPUs, whose chunk
is fixed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence import gpu_spans, linear_recurrence, tpu
from recollect.pallas_kernels.tuning import Key, Sizes
from recollect.pallas_kernels.tuning.measure import Tunable


def _build(key: Key, backend: str):
    """Forward and gradient of a recurrence of this key, on kernels and without."""
    b, t, h, k, v = (
        int(key.get(name, default)) for name, default in (("b", 4), ("t", 4096), ("h", 16), ("k", 64), ("v", 64))
    )
    k = k if "k" in key else v
    dtype = jnp.dtype(str(key.get("dtype", "bfloat16")))
    keys = jax.random.split(jax.random.key(0), 5)
    inputs: dict[str, Any] = {
        "q": jax.random.normal(keys[0], (b, t, h, k)),
        "k": jax.random.normal(keys[1], (b, t, h, k)),
        "v": jax.random.normal(keys[2], (b, t, h, v)),
    }
    inputs["k"] /= jnp.linalg.norm(inputs["k"], axis=-1, keepdims=True)
    if key.get("erase"):
        inputs["erase_read"] = jax.nn.sigmoid(jax.random.normal(keys[4], (b, t, h, 1))) * inputs["k"]
    inputs = {name: x.astype(dtype) for name, x in inputs.items()}
    if key.get("decay", "none") != "none":
        shape = (b, t, h) if key["decay"] == "head" else (b, t, h, k)
        inputs["log_decay"] = jax.nn.log_sigmoid(jax.random.normal(keys[3], shape) + 3)

    def on(name: str):
        def loss(x):
            return jnp.sum(jnp.sin(linear_recurrence(**x, scale=k**-0.5, backend=name)[0].astype(jnp.float32)))

        return jax.value_and_grad(loss)

    return on(backend), on("xla"), (inputs,)


def _chunk(decay: str, erase: bool, k: int, v: int, dtype: str) -> Sizes:
    return {"chunk": tpu.chunk_size(decay, erase, k, v, dtype)}  # type: ignore[arg-type]


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
        heuristic=gpu_spans.default_spans,
        candidates=gpu_spans.candidates,
        build=lambda key: _build(key, "pallas_gpu"),
    ),
]
