"""Window attention by libraries: what cuDNN is asked for, as it cannot run here, and jax's splash attention
simulated."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from recollect.pallas_kernels import accelerators, dispatch
from recollect.pallas_kernels.softmax_attention import cudnn, softmax_attention, splash

H100 = ("gpu", "NVIDIA H100 80GB HBM3")
NOTHING = {
    "window": None,
    "mask": None,
    "sinks": None,
    "bias": None,
    "dropout": None,
    "query_positions": None,
    "key_positions": None,
    "query_segments": None,
    "key_segments": None,
    "query_fields": None,
    "key_fields": None,
    "scale": 0.1,
    "return_lse": False,
    "deterministic": False,
}


BF16 = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
IDS = jax.ShapeDtypeStruct((2, 256), jnp.int32)


def error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.sqrt(np.mean((found - expected) ** 2)) / np.sqrt(np.mean(expected**2)))


def arrays(t, h, g, k=32, v=32, b=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(t), 4)
    q, k, v = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((b, t, h, k), (b, t, g, k), (b, t, g, v)), strict=False)
    )
    return [x.astype(dtype) for x in (q, k, v)] + [jax.random.normal(keys[3], (h,))]


def results(function, *inputs):
    """Output, and gradients of a sum that weighs it unevenly."""

    def run(*inputs):
        o = function(*inputs)
        return jnp.sum(o.astype(jnp.float32) * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

    (_, o), gradients = jax.jit(jax.value_and_grad(run, argnums=tuple(range(len(inputs))), has_aux=True))(*inputs)
    return [o, *gradients]


def by_form(backend, *, segments=None, window=None, **rest):
    """q, k, v and perhaps sinks to the output, by a backend of the public function."""

    def run(q, k, v, sinks=None):
        return softmax_attention(q, k, v, sinks=sinks, window=window, query_segments=segments, backend=backend, **rest)

    return run


def by_splash(*, segments=None, window=None):
    def run(q, k, v, sinks=None):
        call = NOTHING | {
            "window": window,
            "query_segments": segments,
            "key_segments": segments,
            "scale": q.shape[-1] ** -0.5,
        }
        return splash.softmax_attention(q, k, v, **call | {"sinks": sinks})[0]

    return run


def documents(t: int, b: int = 2) -> jax.Array:
    """Rows of documents of uneven length, with padding at the start, between and inside them, and at the end."""
    rng = np.random.default_rng(t)
    rows = np.sort(rng.integers(1, 4, (b, t)), axis=1)
    rows[rng.random((b, t)) < 0.1] = 0
    rows[0, :3] = 0
    rows[-1, -t // 8 :] = 0
    return jnp.asarray(rows, jnp.int32)


# cuDNN


@pytest.fixture
def installed(monkeypatch):
    """As on a Hopper machine with cuDNN 9.10: jax asks for both while it traces."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(accelerators, "has_cudnn", lambda: True)


def cudnn_calls(lowered) -> list[tuple[str, dict]]:
    """(name, configuration) of the calls of cuDNN in a lowered program."""
    calls = []
    for line in lowered.as_text().splitlines():
        name = re.search(r"@(__cudnn\$\w+)", line)
        if name:
            (config,) = re.findall(r'backend_config = "((?:[^"\\]|\\.)*)"', line)
            calls.append((name[1], json.loads(config.replace(r"\22", '"'))["cudnn_fmha_backend_config"]))
    return calls


def gradient_of_cudnn(window):
    def run(q, k, v, cotangent):
        return jax.vjp(lambda q, k, v: cudnn.softmax_attention(q, k, v, **NOTHING | {"window": window})[0], q, k, v)[1](
            cotangent
        )

    return run


@pytest.mark.parametrize(("window", "asked"), [(None, 0), (1, 1), (100, 100), (299, 299), (300, 0), (1000, 0)])
def test_cudnn_is_asked_for_causal_windows(installed, window, asked):
    """Forward and backward; a length of 0 is no window. Without a causal mask cuDNN would look ahead."""
    q, k = (jax.ShapeDtypeStruct((2, 300, h, 64), jnp.bfloat16) for h in (8, 2))
    with dispatch.aimed_at(*H100):
        assert cudnn.refuses(q, k, k, **NOTHING | {"window": window}) is None
        lowered = jax.jit(gradient_of_cudnn(window)).trace(q, k, k, q).lower(lowering_platforms=("cuda",))
    calls = cudnn_calls(lowered)
    assert [name for name, _ in calls] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for _, config in calls:
        assert config["mask_type"] == "CAUSAL" and config["sliding_window_length"] == asked
        assert config["fmha_scale"] == pytest.approx(0.1) and config["intermediate_tensor_shape"]["dimensions"] == [
            "2",
            "8",
            "300",
            "300",
        ]


def test_cudnn_runs_on_each_device_of_a_mesh(installed):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    q, k = (jax.ShapeDtypeStruct((2, 256, h, 64), jnp.bfloat16) for h in (8, 2))
    with jax.set_mesh(mesh), dispatch.aimed_at(*H100):
        lowered = jax.jit(gradient_of_cudnn(64)).trace(q, k, k, q).lower(lowering_platforms=("cuda",))
    calls = cudnn_calls(lowered)
    assert len(calls) == 2
    assert all(config["intermediate_tensor_shape"]["dimensions"] == ["1", "4", "256", "256"] for _, config in calls)


@pytest.mark.parametrize(("t", "window"), [(63, 7), (130, None), (130, 200)])
def test_what_cudnn_is_asked_for_is_what_the_front_door_means(monkeypatch, t, window):
    """The same call by jax's own form of it, which documents its arguments to mean the same."""
    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **rest: asked(*args, **rest, implementation="xla"),
    )
    *inputs, _ = arrays(t, 4, 2)
    found = results(
        lambda q, k, v: cudnn.softmax_attention(q, k, v, **NOTHING | {"window": window, "scale": 0.2})[0], *inputs
    )
    expected = results(by_form("reference", window=window, scale=0.2), *inputs)
    assert max(map(error, found, expected)) < 2e-6


@pytest.mark.parametrize(
    ("shape", "call", "reason"),
    [
        (BF16, {"mask": jax.ShapeDtypeStruct((1, 256, 256), jnp.bool_)}, "no masks"),
        (BF16, {"sinks": jax.ShapeDtypeStruct((4,), jnp.float32)}, "no sinks"),
        (BF16, {"query_segments": IDS, "key_segments": IDS}, "one document a row"),
        (
            BF16,
            {"query_positions": IDS, "key_positions": jax.ShapeDtypeStruct((2, 256), jnp.int32)},
            "one sequence only",
        ),
        (BF16, {"query_positions": IDS, "key_positions": IDS, "window": 9}, "in stored tokens, not in positions"),
        (BF16, {"query_positions": IDS, "key_positions": IDS}, None),
        (BF16, {"return_lse": True}, "no gradient"),
        (BF16, {"deterministic": True}, "may differ from run to run"),
        (jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32), {}, "float32"),
        (jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float16), {}, None),
        (jax.ShapeDtypeStruct((2, 256, 4, 60), jnp.bfloat16), {}, "multiple of 8"),
        (jax.ShapeDtypeStruct((2, 256, 4, 256), jnp.bfloat16), {}, None),
        (jax.ShapeDtypeStruct((2, 256, 4, 264), jnp.bfloat16), {}, "to 256"),
        (jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16), {}, "at least 128 tokens"),
    ],
)
def test_what_cudnn_refuses(monkeypatch, shape, call, reason):
    monkeypatch.setenv("XLA_FLAGS", "")
    with dispatch.aimed_at(*H100):
        refusal = cudnn.refuses(shape, shape, shape, **NOTHING | call)
    assert refusal is None if reason is None else reason in refusal


def test_cudnn_takes_smaller_heads_before_hopper():
    large = jax.ShapeDtypeStruct((2, 256, 4, 136), jnp.bfloat16)
    with dispatch.aimed_at("gpu", "NVIDIA A100-SXM4-80GB"):
        assert "to 128" in cudnn.refuses(large, large, large, **NOTHING)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", False),
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_dump_to=x --xla_gpu_exclude_nondeterministic_ops", True),
        ("--xla_gpu_deterministic_ops=false", False),
        ("--xla_gpu_deterministic_ops_no=true", False),
    ],
)
def test_xla_can_be_is_deterministic(monkeypatch, flags, told):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert cudnn.is_deterministic() is told
    with dispatch.aimed_at(*H100):
        assert (cudnn.refuses(BF16, BF16, BF16, **NOTHING | {"deterministic": True}) is None) is told


TPU = ("tpu", "TPU v6 lite")


@pytest.mark.parametrize(
    ("device", "call", "taken"),
    [
        (H100, {}, "cudnn"),
        (H100, {"window": 100}, "cudnn"),
        (TPU, {}, "splash"),
        (TPU, {"window": 100, "sinks": jnp.zeros(4), "deterministic": True}, "splash"),
        (TPU, {"return_lse": True}, "pallas_tpu"),
    ],
)
def test_the_front_door_takes_a_library_that_serves(installed, device, call, taken):
    with dispatch.aimed_at(*device), dispatch.recorded_choices() as choices:
        jax.eval_shape(functools.partial(softmax_attention, **call), BF16, BF16, BF16)
    assert choices[0].backend == taken


def test_the_front_door_takes_no_library_whose_gradients_may_differ(installed, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    with dispatch.aimed_at(*H100), dispatch.recorded_choices() as choices:
        jax.eval_shape(functools.partial(softmax_attention, deterministic=True), BF16, BF16, BF16)
    assert (
        choices[0].backend in ("pallas_gpu", "xla")
        and "may differ from run to run" in dict(choices[0].passed_over)["cudnn"]
    )


# splash attention

CASES = [
    # t, h, g, window, documents, sinks
    (260, 4, 2, None, True, True),
    (257, 2, 1, 100, False, False),
]
SLOW_CASES = [
    (1, 2, 2, None, False, True),
    (63, 2, 1, 7, True, False),
    (257, 4, 1, 1, True, True),
    (300, 4, 4, 128, True, True),
    (1000, 2, 2, 300, True, False),
    (1000, 2, 1, None, False, True),
]


@pytest.mark.parametrize(
    ("t", "h", "g", "window", "packed", "with_sinks"),
    CASES + [pytest.param(*case, marks=pytest.mark.wide) for case in SLOW_CASES],
)
def test_splash_is_the_reference(t, h, g, window, packed, with_sinks):
    *inputs, sinks = arrays(t, h, g, k=32, v=24)
    inputs += [sinks] if with_sinks else []
    segments = documents(t) if packed else None
    with dispatch.interpreted():
        found = results(by_splash(segments=segments, window=window), *inputs)
    expected = results(by_form("reference", segments=segments, window=window), *inputs)
    # Products of two fp32 numbers a CPU makes whole; on a TPU they would be bf16's, so fp32 is refused there.
    assert max(map(error, found, expected)) < 1e-5
    if packed:
        assert np.all(np.asarray(found[0])[np.asarray(segments) == 0] == 0)


@pytest.mark.wide
@pytest.mark.parametrize("window", [None, 200])
def test_splash_in_half_precision_is_as_close_as_xla(window):
    *inputs, sinks = arrays(1000, 8, 2, k=64, v=64, dtype=jnp.bfloat16)
    segments = documents(1000)
    with dispatch.interpreted():
        found = results(by_splash(segments=segments, window=window), *inputs, sinks)
    plain = results(by_form("xla", segments=segments, window=window), *inputs, sinks)
    expected = results(
        by_form("reference", segments=segments, window=window), *(x.astype(jnp.float32) for x in inputs), sinks
    )
    for index, (own, xla, exact) in enumerate(zip(found, plain, expected, strict=True)):
        assert error(own, exact) < min(0.01 if index else 0.005, max(2 * error(xla, exact), 0.005)), index


def test_splash_never_reads_padding_and_repeats_itself():
    segments = documents(256)
    real = (segments != 0)[:, :, None, None]
    clean = [jnp.where(real, x, 0) for x in arrays(256, 2, 1)[:3]]
    dirty = [jnp.where(real, x, jnp.nan) for x in clean]
    run = functools.partial(results, by_splash(segments=segments))
    with dispatch.interpreted():
        jax.tree.map(np.testing.assert_array_equal, run(*dirty), run(*clean))


def test_splash_does_not_race():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    *inputs, sinks = arrays(256, 2, 1, k=16, v=16, b=1)
    with dispatch.interpreted("races"):
        found = results(by_splash(window=100), *inputs, sinks)
    assert not interpret_pallas_call.races.races_found  # the flag is internal; it is only printed else
    assert max(map(error, found, results(by_form("reference", window=100), *inputs, sinks))) < 1e-5


def test_splash_on_a_mesh():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    *inputs, sinks = arrays(128, 4, 2, k=16, v=16)
    segments = documents(128)
    with dispatch.interpreted():
        with jax.set_mesh(mesh):
            found = jax.jit(by_splash(segments=segments))(*inputs, sinks)
        assert error(found, jax.jit(by_splash(segments=segments))(*inputs, sinks)) < 1e-6


@pytest.mark.parametrize(
    ("shape", "call", "reason"),
    [
        (BF16, {}, None),
        (
            BF16,
            {"sinks": jax.ShapeDtypeStruct((4,), jnp.float32), "window": 9, "query_segments": IDS, "key_segments": IDS},
            None,
        ),
        (BF16, {"mask": jax.ShapeDtypeStruct((1, 256, 256), jnp.bool_)}, "no masks"),
        (BF16, {"query_segments": IDS, "key_segments": jax.ShapeDtypeStruct((2, 256), jnp.int32)}, "one sequence only"),
        (BF16, {"query_positions": IDS, "key_positions": IDS, "window": 9}, "in stored tokens, not in positions"),
        (BF16, {"query_positions": IDS, "key_positions": IDS}, None),
        (BF16, {"return_lse": True}, "no gradient"),
        (BF16, {"deterministic": True}, None),
        (jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32), {}, "bfloat16; got float32"),
        (jax.ShapeDtypeStruct((2, 256, 4, 264), jnp.bfloat16), {}, "at most 256"),
        (jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16), {}, "256 to 16384 tokens; got 64"),
        (jax.ShapeDtypeStruct((2, 16385, 4, 64), jnp.bfloat16), {}, "256 to 16384 tokens; got 16385"),
    ],
)
def test_what_splash_refuses(shape, call, reason):
    refusal = splash.refuses(shape, shape, shape, **NOTHING | call)
    assert refusal is None if reason is None else reason in refusal


def test_splash_visits_what_the_window_holds():
    """Steps of its grids for a block of queries (of keys, for their gradients): 2 blocks of 256 keys hold a window
    of 256."""
    windowed, causal = (splash._kernel(4, 2048, window, 256, False) for window in (256, None))
    for kernel, most in ((windowed, 2), (causal, 8)):
        assert kernel.fwd_mask_info.block_mask.shape[1:] == kernel.dq_mask_info.block_mask.shape[1:] == (8, most)
        assert kernel.dkv_mask_info.block_mask.shape[1:] == (most, 8)


def test_a_jax_without_splash_attention_is_refused(monkeypatch):
    monkeypatch.setattr(splash, "_library", lambda: None)
    assert "has no splash attention" in splash.refuses(BF16, BF16, BF16, **NOTHING)


@settings(deadline=None, max_examples=50)
@given(t=st.integers(1, 20_000), window=st.none() | st.integers(1, 30_000))
def test_blocks_hold_the_sequence(t, window):
    block, length = splash.block_sizes(t, window)
    assert block in splash.BLOCKS and length % block == 0 and t <= length < t + block
    assert block == splash.LANES or (length - t <= t / 8 and (window is None or block <= max(window, splash.LANES)))
    if t % 512 == 0 and (window is None or window >= 512):
        assert block == 512
