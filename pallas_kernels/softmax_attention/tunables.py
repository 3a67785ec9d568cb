"""What of softmax attention is measured on a device: the tiles of its scheduled kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.scheduled_attention import gpu, tpu
from recollect.pallas_kernels.softmax_attention import softmax_attention
from recollect.pallas_kernels.softmax_attention.scheduled import default_tiles
from recollect.pallas_kernels.tuning import Key, Sizes
from recollect.pallas_kernels.tuning.measure import Tunable

SIZES = {"gpu": (64, 128, 256), "tpu": (128, 256, 512, 1024)}


def _build(key: Key, backend: str) -> Any:
    """Forward and gradient at this key, on the scheduled kernels and on xla; few heads, as time is the same for
    each."""
    t, s, k, v, window = (int(key[name]) for name in ("t", "s", "k", "v", "window"))
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((1, t, 8, k), (1, s, 8, k), (1, s, 8, v))
    given = tuple(
        jax.random.normal(each, shape).astype(str(key["dtype"])) for each, shape in zip(keys, shapes, strict=True)
    )

    def on(name: str) -> Any:
        def loss(q, k, v):
            # The log-sum-exp keeps libraries, which lack its gradient, from serving in place of the kernels.
            out, lse = softmax_attention(q, k, v, window=window or None, return_lse=True, backend=name)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(lse))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))

    return on(backend), on("xla"), given


def _candidates(platform: str) -> Any:
    def of(key: Key) -> Iterable[Sizes]:
        fitting = [size for size in SIZES[platform] if size <= int(key["t"])]
        return [{"query_tile": query, "key_tile": keys} for query in fitting for keys in fitting]

    return of


TUNABLES = [
    Tunable(
        kernel=f"softmax_attention.{platform}_tiles",
        platform=platform,
        keys=[
            {"t": t, "s": t, "k": d, "v": d, "dtype": "bfloat16", "window": window}
            for t, window in ((2048, 0), (4096, 0), (4096, 512), (16384, 512))
            for d in (64, 128)
        ],
        heuristic=default_tiles(kernels),
        candidates=_candidates(platform),
        build=functools.partial(_build, backend=f"pallas_{platform}"),
    )
    for platform, kernels in (("gpu", gpu), ("tpu", tpu))
]
