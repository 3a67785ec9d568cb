"""Chunk scans on the GPU kernels, simulated, and the arguments that their tests share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.linear_recurrence import gpu
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks
from recollect.pallas_kernels.tuning import forced
from tests.pallas_kernels import simulator
from tests.pallas_kernels.test_linear_recurrence import error

C = gpu.CHUNK


# bf16 products: each rounded factor is off by 2^-9 at most, 0.0017 rms; scores, weights and the entering state are
# rounded once more.
CLOSE = {
    "o": 0.005,
    "y": 0.005,
    "dots": 0.005,
    "second_o": 0.005,
    "second_dots": 0.005,
    "state": 0.003,
    "checkpoints": 0.003,
}


def some_chunks(t: int, heads: int, channels: int, decay: str, documents: bool, strength: float) -> Chunks:
    """Decays of mean `strength`, none beyond the 10 per token that callers clamp at; up to four documents."""
    rng = np.random.default_rng(t + channels)
    total = None
    if decay != "none":
        g = -np.minimum(np.abs(rng.normal(size=(1, t // C, C, heads, channels))) * strength, 10.0)
        total = np.cumsum(g, axis=2).reshape(1, t, heads, channels).astype(np.float32)
        total = jnp.asarray(np.moveaxis(total[..., 0], 1, 2) if decay == "head" else total)
    if not documents:
        return Chunks(C, decay, total)
    segments = np.sort(rng.integers(1, 5, (1, t)), axis=1).astype(np.int32)
    rows = segments.reshape(1, t // C, C)
    last = rows[:, :, -1]
    before = np.concatenate([np.ones((1, 1), np.int32), last[:, :-1]], axis=1)
    starts, ends, keeps = rows == before[:, :, None], rows == last[:, :, None], last == before
    return Chunks(
        C,
        decay,
        total,
        jnp.asarray(segments),
        *(jnp.asarray(x, jnp.float32) for x in (starts.reshape(1, t), ends.reshape(1, t), keeps)),
    )


def rows(t: int, heads: int, channels: int, seed: int, size: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1, t, heads, channels)) * size, jnp.bfloat16)


def simulated(run, *arrays, spans=1, **settings):
    """The kernel's results, time cut in spans; fails on a race."""
    try:
        with dispatch.interpreted("races"), forced(**{"linear_recurrence.gpu_spans": {"spans": spans}}):
            found = jax.block_until_ready(jax.jit(functools.partial(run, **settings))(*arrays))
        assert not simulator.races_found()
    finally:
        simulator.reset()
    return found


def exactly(run, *arrays, **settings):
    """Results of chunk_scan_by_einsum in fp64."""

    def widened(x):
        return jnp.asarray(np.asarray(x, np.float64)) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)

    with jax.enable_x64(True):
        arrays = jax.tree.map(widened, arrays)
        return jax.tree.map(np.asarray, jax.jit(functools.partial(run, **settings))(*arrays))


def compare(found, expected) -> None:
    for name, allowed in CLOSE.items():
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.shape == other.shape, name
            assert error(one, other) < allowed, (name, error(one, other))


def scan_with(run, q, k, v, chunks, state, dot_with, **settings):
    return run(q, k, v, chunks, initial_state=state, dot_with=dot_with, **settings)


def delta_scan_with(run, w, u, k, chunks, given, **settings):
    return run(w, u, k, chunks, **given, **settings)


def paired_with(run, q, k, v, chunks, given, **settings):
    return run(q, k, v, chunks, **given, **settings)


def solve_with(run, *arrays, **settings):
    return run(*arrays[:-2], strength=arrays[-2], log_decay=arrays[-1], **settings)
