"""Every mixer obeys one contract. A mixer exported by `layers` is held to all laws, in its default configuration and in
the variants listed here; a law that cannot hold is listed by name with its reason, which pytest prints."""

from __future__ import annotations

import functools

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.configuration import UserError
from recollect.export.safetensors_format import export_safetensors, load_safetensors
from recollect.layers.mixer import Context, MixerConfig, Place
from recollect.layers.modules import feature_maps
from recollect.layers.modules.positions import LearnedPositions, Rotary
from recollect.layers.modules.score_biases import Alibi, RelativeBias
from recollect.layers.state import bounded_parts, check_capacity, overfull
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.models.language_model import state_bytes
from recollect.pallas_kernels.dispatch import preferred_backend
from tests.training.sharded import MESHES, assert_same_as_on_one_device

WIDTH = 16

VARIANTS: dict[str, list[MixerConfig]] = {
    "Attention": [
        layers.Attention(heads=4, key_heads=2, positions=Rotary(), query_key_norm=True, bias=True),
        layers.Attention(heads=2, positions=LearnedPositions(maximum=300)),
        layers.Attention(heads=4, key_heads=2, positions=Alibi()),
    ],
    "SlidingWindow": [
        layers.SlidingWindow(window=7, heads=4, key_heads=2, positions=Rotary()),
        layers.SlidingWindow(window=5, heads=2, sinks="learned", positions=RelativeBias(buckets=4, distance=5)),
        layers.SlidingWindow(
            window=5, heads=2, sinks="first", first=3, positions=Rotary(fraction=0.5, layout="interleaved")
        ),
    ],
    "LinearAttention": [
        layers.LinearAttention(heads=2, feature_dim=3, chunk=16),
        layers.LinearAttention(heads=2, feature_map=feature_maps.EluPlusOne(), chunk=7, positions=Rotary()),
        layers.LinearAttention(heads=2, feature_map=feature_maps.Relu(), chunk=16, decay="retnet"),
        layers.LinearAttention(heads=2, feature_map=feature_maps.Exp(), chunk=64),
        layers.LinearAttention(heads=2, feature_map=feature_maps.Hedgehog(), chunk=16),
        layers.LinearAttention(
            heads=4, feature_map=feature_maps.Identity(), normalise=False, decay="retnet", output_norm=True, chunk=16
        ),
    ],
    "ShortConvolution": [
        layers.ShortConvolution(kernel=3, bias=True, activation="silu"),
        layers.ShortConvolution(kernel=1),
    ],
    "BaseConvolution": [
        layers.BaseConvolution(kernel=None, maximum_length=300),
        layers.BaseConvolution(kernel=None, filter="explicit", maximum_length=300),
    ],
    "GatedConvolution": [layers.GatedConvolution(kernel=4, expansion=2)],
    "Hyena": [layers.Hyena(maximum_length=300, filter_order=16)],
    "Landmark": [
        layers.Landmark(block=4, heads=4, key_heads=2, positions=Rotary()),
        layers.Landmark(block=3, heads=2, positions=Rotary(), retrieve=2),
    ],
    "MixtureOfHeads": [
        layers.MixtureOfHeads(heads=4, shared=1, active=2, gates="paper", balance="code", positions=Rotary()),
        layers.MixtureOfHeads(heads=4, shared=4, active=0),
    ],
}

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""(law, case) -> reason."""

# Tolerances on rms(error)/rms(reference). fp32 sums in another order differ by a few 1e-7 times the root of their
# length.
FP32 = 2e-5
# Products of bf16 inputs carry 2^-9 each; a mixer chains three to five of them.
BF16 = 0.03


def _cases() -> list[tuple[str, MixerConfig]]:
    found = []
    for cls in layers.MIXERS:
        found.append((cls.__name__, cls()))
        found += [(f"{cls.__name__}-{index}", config) for index, config in enumerate(VARIANTS.get(cls.__name__, []), 1)]
    return found


CASES = dict(_cases())


def law(test):
    """Runs a law over every case; listed exceptions are skipped with their reason."""

    @pytest.mark.parametrize("case", CASES)
    @functools.wraps(test)
    def run(case, *args, **kwargs):
        reason = EXCEPTIONS.get((test.__name__, case))
        if reason:
            pytest.skip(f"{test.__name__} cannot hold for {case}: {reason}")
        test(case, *args, **kwargs)

    return run


@functools.cache
def mixer(case: str):
    """The module with weights large enough that every path matters."""
    module = CASES[case].build(WIDTH, Place(1, 4), nnx.Rngs(params=jax.random.key(3)))
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state)
    return graph, state


def call(case: str, x, context=Context()):
    return _full(case)(mixer(case)[1], x, context)


@functools.cache
def _full(case: str):
    graph, _ = mixer(case)
    return jax.jit(lambda weights, x, context: nnx.merge(graph, weights)(x, context).hidden)


@functools.cache
def _extend(case: str):
    graph, _ = mixer(case)

    def run(weights, x, state, context):
        out, state = nnx.merge(graph, weights).extend(x, state, context)
        return out.hidden, state

    return jax.jit(run)


def inputs(t: int, b: int = 2, seed: int = 0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (b, t, WIDTH), dtype)


def error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-12))


DOCUMENTS = np.array([[1] * 5 + [2] * 31 + [3] + [4] * 12 + [0] * 14, [7] * 44 + [9] * 19])
"""Two rows of 63 tokens: several documents, padding at the end; segment numbers need not count up by one."""


@law
def test_1_causal(case):
    x = inputs(63)
    base = np.asarray(call(case, x))
    for place in (0, 1, 17, 62):
        changed = np.asarray(call(case, x.at[:, place].add(1.0)))
        if CASES[case].traits.exact_causality:
            np.testing.assert_array_equal(changed[:, :place], base[:, :place])
        else:
            assert place == 0 or error(changed[:, :place], base[:, :place]) < 1e-5
        assert np.abs(changed[:, place] - base[:, place]).max() > 1e-4, "an output must depend on its own input"


@law
def test_2_streaming(case):
    x = inputs(63)
    expected = call(case, x)
    graph, weights = mixer(case)
    module = nnx.merge(graph, weights)
    state = module.init_state(2, 63)
    outs = []
    for index in range(63):
        out, state = _extend(case)(weights, x[:, index : index + 1], state, Context())
        outs.append(out)
    assert error(jnp.concatenate(outs, axis=1), expected) < FP32
    state = module.init_state(2, 63)
    outs = []
    for start in range(0, 63, 21):
        out, state = _extend(case)(weights, x[:, start : start + 21], state, Context())
        outs.append(out)
    assert error(jnp.concatenate(outs, axis=1), expected) < FP32


@law
def test_2_streaming_ragged(case):
    """Rows advance by different numbers of tokens a call; padding stands left, right and between; documents end
    inside calls."""
    x = inputs(63)
    segments = DOCUMENTS
    expected = np.asarray(call(case, x, Context(segments=jnp.asarray(segments))))
    graph, weights = mixer(case)
    state = nnx.merge(graph, weights).init_state(2, 63)
    rng = np.random.default_rng(0)
    size, done = 9, [0, 0]
    found = np.zeros_like(expected)
    real = [int((row != 0).sum()) for row in segments]
    while any(d < r for d, r in zip(done, real, strict=True)):
        chunk_x = np.full((2, size, WIDTH), np.nan, np.float32)
        chunk_segments = np.zeros((2, size), np.int32)
        places = []
        for row in range(2):
            count = min(int(rng.integers(0, size + 1)), real[row] - done[row])
            slots = np.sort(rng.choice(size, count, replace=False))
            source = np.arange(done[row], done[row] + count)
            chunk_x[row, slots] = np.asarray(x)[row, source]
            chunk_segments[row, slots] = segments[row, source]
            places.append((slots, source))
            done[row] += count
        out, state = _extend(case)(weights, jnp.asarray(chunk_x), state, Context(segments=jnp.asarray(chunk_segments)))
        for row, (slots, source) in enumerate(places):
            found[row, source] = np.asarray(out)[row, slots]
    mask = (segments != 0)[..., None]
    assert error(np.where(mask, found, 0), np.where(mask, expected, 0)) < FP32


@law
def test_3_packing(case):
    x = inputs(63)
    packed = np.asarray(call(case, x, Context(segments=jnp.asarray(DOCUMENTS))))
    for row in range(2):
        for segment in set(DOCUMENTS[row]) - {0}:
            tokens = np.flatnonzero(DOCUMENTS[row] == segment)
            alone = np.zeros((2, 63, WIDTH), np.float32)
            alone[0, : len(tokens)] = np.asarray(x)[row, tokens]
            segments = np.zeros((2, 63), np.int32)
            segments[0, : len(tokens)] = 1
            found = np.asarray(call(case, jnp.asarray(alone), Context(segments=jnp.asarray(segments))))
            assert error(packed[row, tokens], found[0, : len(tokens)]) < FP32
    # And alone without any segments at all, which takes another path.
    tokens = np.flatnonzero(DOCUMENTS[1] == 7)
    assert error(packed[1, tokens], call(case, x[1:, tokens])[0]) < FP32


@law
def test_4_padding(case):
    segments = jnp.asarray(DOCUMENTS).at[1, :6].set(0)  # padding before, too
    real = (segments != 0)[..., None]
    x = inputs(63)
    graph, weights = mixer(case)

    def loss(weights, x):
        out = nnx.merge(graph, weights)(x, Context(segments=segments)).hidden
        return jnp.sum(jnp.where(real, jnp.sin(out), 0))

    grad_fn = jax.jit(jax.value_and_grad(loss))
    value, clean = grad_fn(weights, jnp.where(real, x, 0))
    poisoned, grads = grad_fn(weights, jnp.where(real, x, jnp.nan))
    assert np.isfinite(float(value)) and float(value) == float(poisoned)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@law
@pytest.mark.parametrize("t", [1, 63, 257])
def test_5_and_9_implementations_agree_at_odd_lengths(case, t):
    x = inputs(t, b=1)
    graph, weights = mixer(case)

    def run(weights, x):
        out = nnx.merge(graph, weights)(x)
        return jnp.sum(jnp.sin(out.hidden)), out.hidden

    fast = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, out), grads = fast(weights, x)
    with preferred_backend("reference"):
        (_, expected), expected_grads = jax.jit(
            jax.value_and_grad(lambda w, x: run(w, x), argnums=(0, 1), has_aux=True)
        )(weights, x)
    assert out.shape == x.shape and np.isfinite(np.asarray(out)).all()
    assert error(out, expected) < FP32
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected_grads))
    for grad, expected_grad in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        # Gradients that are zero in exact arithmetic (a key bias, say) are rounding in both.
        assert float(jnp.max(jnp.abs(grad - expected_grad))) < 1e-4 * size


@law
def test_6_state_size(case):
    graph, weights = mixer(case)
    module = nnx.merge(graph, weights)
    for length in (32, 128):
        state = module.init_state(1, length)
        measured = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
        assert state_bytes(jax.eval_shape(lambda length=length: module.init_state(1, length))) == measured
        _, after = _extend(case)(weights, inputs(3, b=1), state, Context())
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == [
            (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)
        ]


@law
def test_11_streams_past_their_length(case):
    """A state that grows with the length it is made for refuses more tokens; one that does not takes any number."""
    graph, weights = mixer(case)
    module = nnx.merge(graph, weights)
    whole = inputs(63)
    x, expected = whole[:, :18], call(case, whole)[:, :18]

    def compiled(state, segments):
        outs = []
        for start in range(0, len(segments[0]), 3):
            context = Context(segments=jnp.asarray(segments, jnp.int32)[:, start : start + 3])
            out, state = _extend(case)(weights, x[:, start : start + 3], state, context)
            outs.append(out)
        return jnp.concatenate(outs, axis=1), state

    sizes = [state_bytes(jax.eval_shape(lambda length=length: module.init_state(2, length))) for length in (128, 256)]
    # The default window (64) does not slide over 9 tokens either.
    bounded = sizes[0] < sizes[1] or getattr(CASES[case], "window", 0) > 9
    ones, padding = [[1] * 18] * 2, [[0] * 3] * 2
    out, past = compiled(module.init_state(2, 9), ones)
    assert error(out[:, :9], expected[:, :9]) < FP32
    assert bool(jax.jit(overfull)(past)) == bounded
    if not bounded:
        assert error(out, expected) < FP32 and bounded_parts(past) == []
        check_capacity(past)
        return

    # Inside jit a flag went up. It stays, and the next call outside raises.
    _, past = compiled(past, padding)
    for late in (lambda: module.extend(x[:, :1], past), lambda: check_capacity(past)):
        with pytest.raises(UserError, match=r"a compiled function gave this state 18 tokens; it has room for 9 "):
            late()
    # Outside: refused, with capacity, tokens held and tokens added. Padding takes no room; each row has its own.
    with pytest.raises(UserError, match=r"room for 9 tokens; it holds 0, and 10 more"):
        module.extend(x[:, :10], module.init_state(2, 9))
    _, full = compiled(module.init_state(2, 9), [[1] * 9, [1] * 7 + [0] * 2])
    check_capacity(full)
    with pytest.raises(UserError, match=r"room for 9 tokens; it holds 7, and 3 more"):
        module.extend(x[:, :3], full, Context(segments=jnp.asarray([[0] * 3, [1] * 3])))
    _, full = compiled(full, [[0] * 3, [1, 0, 1]])
    assert not bool(overfull(full))
    with pytest.raises(UserError, match=r"room for 9 tokens; it holds 9, and 1 more"):
        module.extend(x[:, :1], full)


@law
def test_7_bf16(case):
    """Inputs are exactly representable, so routers (fp32) choose alike; retrieval scores are products in bf16 and
    may flip."""
    x = inputs(63, dtype=jnp.bfloat16)
    low = call(case, x)
    assert low.dtype == jnp.bfloat16
    high = call(case, x.astype(jnp.float32))
    if getattr(CASES[case], "retrieve", None) is None:
        assert error(low, high) < BF16
        return
    wrong = np.sqrt(np.mean((np.asarray(low, np.float32) - high) ** 2, axis=-1)) > BF16 * float(
        jnp.sqrt(jnp.mean(high**2))
    )
    print(f"{case}: {wrong.mean():.1%} of queries retrieve other blocks in bf16")
    assert wrong.mean() < 0.1


def _model(case: str) -> FunctionalModel:
    return FunctionalModel(LanguageModel(width=WIDTH, stages=repeat(CASES[case], depth=1)), 24)


@law
def test_8_sharded(case):
    """Over one mesh a case, in turn; over all of them in tests/pallas_kernels/test_every_mesh.py."""
    several = [mesh for name, mesh in MESHES.items() if " " in name]
    assert_same_as_on_one_device(CASES[case], several[list(CASES).index(case) % len(several)])


@law
def test_10_export_and_back(case, tmp_path):
    model = _model(case)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 21), 0, 24)
    run = jax.jit(lambda params, tokens: model.bind(params)(tokens))
    export_safetensors(params, model.config, tmp_path / "out", extra={})
    loaded, config = load_safetensors(tmp_path / "out")
    assert config == model.config
    np.testing.assert_array_equal(np.asarray(run(params, tokens)), np.asarray(run(loaded, tokens)))


def test_maximum_length_is_enforced():
    for case, config in CASES.items():
        limit = config.traits.maximum_length
        if limit is not None:
            with pytest.raises(UserError, match=str(limit)):
                config.build(WIDTH, Place(), nnx.Rngs(params=jax.random.key(0)))(jnp.zeros((1, limit + 1, WIDTH)))
            assert case


def test_every_exported_mixer_is_here():
    assert {type(config) for config in CASES.values()} == set(layers.MIXERS)
    assert all(chz.is_chz(config) for config in CASES.values())
