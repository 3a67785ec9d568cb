"""Scheduled attention's GPU kernels, simulated: values and all gradients against their plain form (tiles_by_einsum);
refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import compile_ahead, dispatch
from recollect.pallas_kernels import mosaic_gpu as mosaic
from recollect.pallas_kernels.landmark_attention import landmark_attention
from recollect.pallas_kernels.masks import causal
from recollect.pallas_kernels.scheduled_attention import gpu
from recollect.pallas_kernels.softmax_attention import softmax_attention
from tests.pallas_kernels import tiles_by_einsum
from tests.pallas_kernels.programs.scheduled_attention_gpu import PROGRAMS
from tests.pallas_kernels.simulator import races_found
from tests.pallas_kernels.test_scheduled_attention_tpu import attended, error, gathered, landmarks, plain

WIDE = {"k": 64, "v": 64, "b": 1}
ONE = {**WIDE, "h": 1, "g": 1}
SMALL, LARGE = {"tiles": (64, 64)}, {"tiles": (128, 128)}

# what makes it, its sizes, whether races are looked for
CASES = {
    "63, window, sinks, documents": (plain, {**SMALL, **ONE, "t": 63, "window": 20, "sinks": True}, "races"),
    "more tiles than stages, two warpgroups": (plain, {**ONE, "t": 330, "tiles": (128, 64), "packed": False}, "values"),
    "gathered": (gathered, {**SMALL, **WIDE, "n": 128, "s": 70, "g": 2}, "races"),
    "landmark blocks 13": (
        landmarks,
        {**ONE, "t": 63, "blocks": 3, "block": 13, "slots": 64, "query_tile": 64},
        "races",
    ),
}
MORE = {
    "one token": (plain, {**SMALL, **ONE, "t": 1}, "races"),
    "no mask": (plain, {**SMALL, **ONE, "t": 128, "packed": False}, "values"),
    "any expression": (plain, {**LARGE, **ONE, "t": 130, "mask": "odd"}, "races"),
    "own blocks": (plain, {**LARGE, **WIDE, "t": 200, "h": 2, "g": 1, "mask": "own"}, "races"),
    "257, grouped heads, odd sizes": (
        plain,
        {**LARGE, "b": 2, "t": 257, "h": 4, "g": 2, "k": 40, "v": 72, "sinks": True},
        "races",
    ),
    "128 channels": (plain, {**LARGE, **ONE, "t": 300, "k": 128, "v": 128, "window": 90}, "races"),
    "128 and 64 channels": (plain, {**LARGE, **ONE, "t": 130, "k": 128, "v": 64}, "races"),
    "64 and 128 channels, 64 rows": (plain, {**SMALL, **ONE, "t": 100, "k": 64, "v": 128}, "races"),
    "1000": (plain, {**LARGE, **ONE, "t": 1000, "window": 200}, "races"),
    "1000, all before": (plain, {**LARGE, **ONE, "t": 1000, "packed": False}, "races"),
    "gathered 257": (gathered, {**LARGE, **WIDE, "n": 257, "s": 200, "g": 3, "b": 2}, "races"),
    "landmark blocks 50": (
        landmarks,
        {**WIDE, "t": 257, "h": 2, "g": 1, "blocks": 5, "block": 50, "slots": 64, "query_tile": 128},
        "races",
    ),
    "landmark blocks 63": (
        landmarks,
        {**ONE, "t": 130, "blocks": 6, "block": 63, "slots": 64, "query_tile": 64, "packed": False},
        "races",
    ),
    "landmark blocks 50, 128 channels": (
        landmarks,
        {
            "b": 1,
            "k": 128,
            "v": 128,
            "t": 257,
            "h": 1,
            "g": 1,
            "blocks": 5,
            "block": 50,
            "slots": 64,
            "query_tile": 128,
        },
        "races",
    ),
}


@dataclasses.dataclass(frozen=True)
class Always:
    """Sees everything, and its bounds know it: no tile's mask is looked at."""

    fields = frozenset({"positions"})

    def allows(self, query: Any, key: Any) -> Any:
        return query.positions + key.positions >= 0

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return np.True_, np.True_


LIMITS = {"o": 0.005, "lse": 1e-5}


def rounded(arrays):
    return {name: x if name == "sinks" else x.astype(jnp.bfloat16) for name, x in arrays.items()}


def check(arrays, call, how="values"):
    arrays = rounded(arrays)
    with dispatch.interpreted(how):
        found = attended(gpu, arrays, **call)
        assert how == "values" or not races_found()
    assert all(found[name].dtype == jnp.bfloat16 for name in ("o", "q", "k", "v")) and found["lse"].dtype == jnp.float32
    for name, x in attended(tiles_by_einsum, arrays, jnp.float32, **call).items():
        assert error(found[name], x) < LIMITS.get(name, 0.01), name


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.wide) for name in MORE)])
def test_the_kernels_are_their_plain_form(name):
    make, sizes, how = (CASES | MORE)[name]
    arrays, call = make(**sizes)
    check(arrays, call | ({"mask": Always()} if name == "no mask" else {}), how)


@pytest.mark.wide
@pytest.mark.gpu_interpreter
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_may_be_zero_or_negative(scale):
    arrays, call = plain(63, **SMALL, **ONE, sinks=True)
    check(arrays, call | {"scale": scale})


@pytest.mark.gpu_interpreter
def test_what_no_schedule_names_is_not_read():
    """Keys that all queries have left behind may be NaN: their tiles are not visited, and their own gradients are 0."""
    arrays, call = plain(192, **SMALL, **ONE, packed=False, window=8)
    call |= {"mask": causal(8), "query_fields": {**call["query_fields"], "positions": np.arange(192)[None] + 80}}
    unseen = np.arange(192)[None, :, None, None] < 64
    arrays = rounded(arrays | {name: jnp.where(unseen, jnp.nan, arrays[name]) for name in ("k", "v")})
    with dispatch.interpreted():
        found = attended(gpu, arrays, **call)
    assert np.isfinite(found["lse"][:, :119]).all() and np.isneginf(found["lse"][:, 119:]).all()
    assert all(np.isfinite(np.asarray(found[name], np.float32)).all() for name in ("o", "q", "k", "v"))
    assert not found["o"][:, 119:].any() and not found["q"][:, 119:].any()
    assert not found["k"][:, :73].any() and not found["v"][:, :73].any() and found["k"][:, 74:].any()


@pytest.mark.wide
@pytest.mark.gpu_interpreter
def test_the_same_bits_twice():
    arrays, call = plain(130, **LARGE, **WIDE, h=2, g=1, sinks=True)
    with dispatch.interpreted():
        first, second = attended(gpu, rounded(arrays), times=2, **call)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    "program", [pytest.param(x, marks=() if x.quick else pytest.mark.wide) for x in PROGRAMS], ids=lambda x: x.name
)
def test_programs_lower_for_cuda(program):
    """Layouts and shared memory, on either version of jax."""
    if mosaic.plgpu is None:
        pytest.skip(str(mosaic.unavailable()))
    compile_ahead.lower_for_cuda(program.function, *program.arguments)


@pytest.mark.parametrize(
    ("k", "v", "dtype", "block", "reason"),
    [
        (64, 64, jnp.float32, None, "its products take bfloat16; q is float32"),
        (136, 64, jnp.bfloat16, None, "a key size above 128"),
        (64, 136, jnp.bfloat16, None, "a value size above 128"),
        (128, 64, jnp.bfloat16, None, "keys of more than 64 channels and values of at most 64"),
        (64, 64, jnp.bfloat16, 64, "a landmark block of more than 63 keys"),
        (136, 64, jnp.bfloat16, 50, "a key size above 128"),
    ],
)
def test_what_it_refuses_it_explains(k, v, dtype, block, reason):
    q, value = jax.ShapeDtypeStruct((1, 64, 2, k), dtype), jax.ShapeDtypeStruct((1, 64, 2, v), dtype)
    with dispatch.aimed_at("gpu", "NVIDIA H100 80GB HBM3"):
        if mosaic.unavailable() is None:
            assert reason in gpu.refuses(q, q, value, block=block)
            served = jax.ShapeDtypeStruct((1, 64, 2, 128), jnp.bfloat16)
            assert gpu.refuses(served, served, served, block=63) is None


def test_what_it_refuses_others_serve():
    """Heads of 256 and landmark blocks of 64 run on xla, which says why the kernels were passed over."""
    if mosaic.plgpu is None:
        pytest.skip(str(mosaic.unavailable()))
    wide, narrow = (jax.ShapeDtypeStruct((1, 130, 2, size), jnp.bfloat16) for size in (256, 64))
    segments = jax.ShapeDtypeStruct((1, 130), jnp.int32)  # which cuDNN refuses
    with dispatch.aimed_at("gpu", "NVIDIA H100 80GB HBM3"), dispatch.recorded_choices() as choices:
        jax.eval_shape(lambda q, s: softmax_attention(q, q, q, query_segments=s), wide, segments)
        jax.eval_shape(lambda q: landmark_attention(q, q, q, block=64), narrow)
    assert [(choice.operation, choice.backend) for choice in choices] == [
        ("softmax_attention", "xla"),
        ("landmark_attention", "xla"),
    ]
    assert "a key size above 128" in dict(choices[0].passed_over)["pallas_gpu"]
    assert "a landmark block of more than 63 keys" in dict(choices[1].passed_over)["pallas_gpu"]


@pytest.mark.parametrize(
    ("n", "s", "block", "tiles"),
    [(1, 1, None, (64, 64)), (64, 65, None, (64, 128)), (1000, 64, None, (128, 64)), (1000, 1000, 50, (128, 64))],
)
def test_tile_sizes(n, s, block, tiles):
    assert gpu.tile_sizes(n, s, 64, 64, jnp.bfloat16, block=block) == tiles
    assert gpu.tile_sizes(n, s, 64, 64, jnp.bfloat16, window=128) == (64, 64)
    assert gpu.tile_sizes(1000, 1000, 64, 64, jnp.bfloat16, window=129) == (128, 128)
