"""The convolution mixers: their equations by hand, streaming, packing, padding, limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError, from_json, to_json
from recollect.layers.mixer import Context, Place
from recollect.layers.mixers.base_convolution import BaseConvolution
from recollect.layers.mixers.gated_convolution import GatedConvolution
from recollect.layers.mixers.hyena import Hyena
from recollect.layers.mixers.short_convolution import ShortConvolution
from recollect.layers.modules.implicit_filter import ReluFilter, SineFilter
from recollect.pallas_kernels.dispatch import interpreted, preferred_backend, recorded_choices

MAXIMUM = 80
CONFIGS = {
    "short": ShortConvolution(kernel=4, bias=True, activation="silu"),
    "one tap": ShortConvolution(kernel=1),
    "base": BaseConvolution(),
    "base implicit": BaseConvolution(kernel=None, maximum_length=MAXIMUM),
    "base activated": BaseConvolution(activation="silu"),
    "base explicit": BaseConvolution(kernel=None, filter="explicit", maximum_length=MAXIMUM),
    "gated": GatedConvolution(),
    "hyena": Hyena(maximum_length=MAXIMUM, filter_order=8),
}
LONG = ("base implicit", "base explicit", "hyena")
WIDTH = 6
TOLERANCE = 3e-6  # fp32, a few matrix products and a Fourier transform


def error(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def build(config, width=WIDTH):
    """A mixer with every parameter of order 1, so that no term hides behind a small initialisation."""
    mixer = config.build(width, Place(0, 2), nnx.Rngs(params=jax.random.key(0)))
    graph, state = nnx.split(mixer)
    leaves, tree = jax.tree.flatten(state)
    random = np.random.default_rng(1)
    leaves = [jnp.asarray(0.5 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def inputs(seed, b, t):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(b, t, WIDTH)), jnp.float32)


def documents(seed, b, t):
    """No padding; documents of about 12 tokens, some of a single one."""
    random = np.random.default_rng(seed)
    return 1 + np.cumsum(random.random((b, t)) < 1 / 12, axis=1).astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("segmented", [False, True])
def test_one_token_at_a_time(name, segmented):
    mixer, x = build(CONFIGS[name]), inputs(0, 2, 37)
    segments = jnp.asarray(documents(1, 2, 37)) if segmented else None
    expected = jax.jit(lambda x: mixer(x, Context(segments=segments)).hidden)(x)
    extend = jax.jit(lambda x, state, segment: mixer.extend(x, state, Context(segments=segment)))
    state, out = mixer.init_state(2, 37), []
    for i in range(37):
        y, state = extend(x[:, i : i + 1], state, None if segments is None else segments[:, i : i + 1])
        out.append(y.hidden)
    assert error(jnp.concatenate(out, axis=1), expected) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [5, 23])
def test_ragged_chunks_with_padding_anywhere(name, chunk):
    """Each row advances at its own pace; NaN padding stands left, right and between; documents end inside chunks."""
    b, t = 3, 70
    mixer, x, segments = build(CONFIGS[name]), inputs(0, b, t), documents(2, b, t)
    expected = np.asarray(jax.jit(lambda x: mixer(x, Context(segments=jnp.asarray(segments))).hidden)(x))
    extend = jax.jit(lambda x, state, segments: mixer.extend(x, state, Context(segments=segments)))
    random = np.random.default_rng(3)
    state, got, done = mixer.init_state(b, t), np.full_like(expected, np.nan), np.zeros(b, int)
    while (done < t).any():
        part, part_segments = np.full((b, chunk, WIDTH), np.nan, np.float32), np.zeros((b, chunk), np.int32)
        places = []
        for row in range(b):
            count = min(random.integers(0, chunk + 1), t - done[row])
            places.append(np.sort(random.permutation(chunk)[:count]))
            part[row, places[row]] = np.asarray(x)[row, done[row] : done[row] + count]
            part_segments[row, places[row]] = segments[row, done[row] : done[row] + count]
        y, state = extend(jnp.asarray(part), state, jnp.asarray(part_segments))
        for row in range(b):
            got[row, done[row] : done[row] + len(places[row])] = np.asarray(y.hidden)[row, places[row]]
            done[row] += len(places[row])
    assert error(got, expected) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_each_alone(name):
    lengths = (1, 30, 2, 40)
    mixer, x = build(CONFIGS[name]), inputs(0, 1, sum(lengths))
    segments = jnp.asarray(np.repeat(np.arange(1, 5), lengths))[None]
    packed = jax.jit(lambda x: mixer(x, Context(segments=segments)).hidden)(x)
    starts = np.cumsum((0, *lengths))
    alone = [jax.jit(mixer)(x[:, start:end]).hidden for start, end in itertools.pairwise(starts)]
    assert error(packed, jnp.concatenate(alone, axis=1)) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_neither_outputs_nor_weight_gradients(name):
    graph, weights = nnx.split(build(CONFIGS[name]))
    x, segments = inputs(0, 2, 20), jnp.ones((2, 20), jnp.int32)
    padded = jnp.full((2, 31, WIDTH), jnp.nan).at[0, 11:].set(x[0]).at[1, :7].set(x[1, :7]).at[1, 15:28].set(x[1, 7:])
    valid = jnp.isfinite(padded[..., 0])

    @jax.jit
    def run(weights, x, segments):
        def total(weights):
            hidden = nnx.merge(graph, weights)(x, Context(segments=segments)).hidden
            return jnp.sum(jnp.where((segments != 0)[..., None], jnp.sin(hidden), 0)), hidden

        (_, hidden), gradients = jax.value_and_grad(total, has_aux=True)(weights)
        return hidden, gradients

    expected, expected_gradients = run(weights, x, segments)
    got, got_gradients = run(weights, padded, valid.astype(jnp.int32))
    assert error(got[valid].reshape(expected.shape), expected) < TOLERANCE
    for a, b in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 1e-5 * float(jnp.linalg.norm(b))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_near_float32(name):
    mixer, x = build(CONFIGS[name]), inputs(0, 2, 63)
    y = mixer(x.astype(jnp.bfloat16)).hidden
    assert y.dtype == jnp.bfloat16
    assert error(y, mixer(x).hidden) < 0.02  # some five roundings of 2^-8 in a row


@pytest.mark.parametrize("name", ["short", "base", "base implicit", "gated", "hyena"])
def test_kernels_serve_the_layers(name):
    mixer, x = build(CONFIGS[name]), inputs(0, 2, 40)
    expected = mixer(x).hidden
    with interpreted(), preferred_backend("pallas_tpu"), recorded_choices() as choices:
        got = jax.jit(lambda x: mixer(x).hidden)(x)
    assert {choice.backend for choice in choices} == {"pallas_tpu"}
    assert error(got, expected) < TOLERANCE


def conv_by_hand(x, taps):
    """x (t, d), taps (k, d), current token first."""
    return np.stack([sum(taps[lag] * x[i - lag] for lag in range(min(i + 1, len(taps)))) for i in range(len(x))])


def weights_of(mixer):
    return {path: np.asarray(value[...], np.float64) for path, value in nnx.to_flat_state(nnx.state(mixer))}


def silu(z):
    return z / (1 + np.exp(-z))


def test_base_convolution_by_hand():
    mixer, x = build(BaseConvolution()), inputs(0, 1, 9)
    w, u = weights_of(mixer), np.asarray(x[0], np.float64)
    convolved = conv_by_hand(u, w["convolution", "taps"]) + w["convolution", "bias"]
    expected = convolved * (u @ w["projection", "kernel"] + w["projection", "bias"]) + u
    assert error(mixer(x).hidden[0], expected) < TOLERANCE


def test_base_convolution_with_activations_by_hand():
    """Zoology's `use_act`."""
    mixer, x = build(BaseConvolution(activation="silu")), inputs(0, 1, 9)
    w, u = weights_of(mixer), np.asarray(x[0], np.float64)
    convolved = conv_by_hand(u, w["convolution", "taps"]) + w["convolution", "bias"]
    expected = silu(convolved) * silu(u @ w["projection", "kernel"] + w["projection", "bias"]) + u
    assert error(mixer(x).hidden[0], expected) < TOLERANCE


@pytest.mark.parametrize(("unit", "end"), [("length", 50), ("last", 49)])
def test_base_convolution_with_a_long_filter_by_hand(unit, end):
    mixer, x = build(BaseConvolution(kernel=None, maximum_length=50, time=unit)), inputs(0, 1, 9)
    w, u = weights_of(mixer), np.asarray(x[0], np.float64)
    time = np.arange(9)[:, None] / end
    phase = np.exp(-1j * 1e-4 * 2 * np.pi * np.arange(9)[:, None] / 50)
    hidden = (
        np.concatenate([time, phase.real, phase.imag], axis=1) @ w["filter", "up", "kernel"] + w["filter", "up", "bias"]
    )
    filter = np.maximum(hidden, 0) @ w["filter", "down", "kernel"] + w["filter", "down", "bias"]
    expected = (conv_by_hand(u, filter) + u) * (u @ w["projection", "kernel"] + w["projection", "bias"]) + u
    assert error(mixer(x).hidden[0], expected) < TOLERANCE


def test_explicit_filter_by_hand():
    mixer, x = build(CONFIGS["base explicit"]), inputs(0, 1, 9)
    w, u = weights_of(mixer), np.asarray(x[0], np.float64)
    assert w["filter", "taps"].shape == (MAXIMUM, WIDTH)
    gate = u @ w["projection", "kernel"] + w["projection", "bias"]
    expected = (conv_by_hand(u, w["filter", "taps"]) + u) * gate + u
    assert error(mixer(x).hidden[0], expected) < TOLERANCE


def test_gated_convolution_by_hand():
    mixer, x = build(GatedConvolution()), inputs(0, 1, 9)
    w, u = weights_of(mixer), np.asarray(x[0], np.float64)
    left, right = np.split(u @ w["input", "kernel"] + w["input", "bias"], 2, axis=1)
    assert left.shape[1] == 2 * WIDTH
    expected = (silu(conv_by_hand(left, w["convolution", "taps"])) * right) @ w["output", "kernel"] + w[
        "output", "bias"
    ]
    assert error(mixer(x).hidden[0], expected) < TOLERANCE


def hyena_times(unit):
    """Times of the first 9 of 30 taps, and what the filter's network takes of them."""
    time = np.arange(9)[:, None] / (30 if unit == "length" else 29)
    phase = np.exp(-1j * 1e-4 * 2 * np.pi * np.arange(9)[:, None] / 30)
    return time, np.concatenate([time, phase.real, phase.imag], axis=1)


def test_trained_times_start_as_the_constant_ones():
    filter = SineFilter(4, 30, 5, nnx.Rngs(params=0), unit="last", trains_times=True)
    np.testing.assert_allclose(filter.embedding[...][:9], hyena_times("last")[1], atol=1e-6)
    assert filter.embedding.get_metadata()["group"] == "filter_times" and filter.embedding[...].shape == (30, 3)


@pytest.mark.parametrize("published", [False, True])
def test_hyena_by_hand(published):
    """As published (Zoology's code): two heads share their filters, the last tap's time is 1, times are parameters."""
    settings = {"heads": 2, "time": "last", "trains_times": True} if published else {}
    heads = settings.get("heads", 1)
    mixer, x = build(Hyena(maximum_length=30, filter_order=5, **settings)), inputs(0, 1, 9)
    w, u = weights_of(mixer), np.asarray(x[0], np.float64)
    time, z = hyena_times(settings.get("time", "length"))
    z = w["filter", "embedding"][:9] if published else z
    for layer in range(3):
        z = np.sin(
            w["filter", "frequency"]
            * (z @ w["filter", "layers", layer, "kernel"] + w["filter", "layers", layer, "bias"])
        )
    decay = np.abs(np.linspace(np.log(0.01) / 1.5, np.log(0.01) / 0.3, WIDTH // heads))
    filter = np.tile(z @ w["filter", "output"] * np.exp(-time * decay), (1, heads))
    projected = (
        conv_by_hand(u @ w["input", "kernel"] + w["input", "bias"], w["convolution", "taps"]) + w["convolution", "bias"]
    )
    x1, x2, v = np.split(projected, 3, axis=1)
    v = v * x1
    v = conv_by_hand(v, filter) + np.tile(w["skip",], heads) * v
    assert error(mixer(x).hidden[0], (v * x2) @ w["output", "kernel"] + w["output", "bias"]) < TOLERANCE


@pytest.mark.parametrize("kind", ["relu", "sine"])
def test_filter_is_the_same_for_any_input_length(kind):
    rngs = nnx.Rngs(params=jax.random.key(0))
    filter = ReluFilter(4, 100, rngs) if kind == "relu" else SineFilter(4, 100, 8, rngs)
    whole = filter(100)
    assert whole.dtype == jnp.float32
    for length in (1, 17, 99):
        assert error(filter(length), whole[:length]) < 1e-6
    if kind == "sine":
        assert {
            (v.get_metadata()["group"], v.get_metadata()["decay"]) for _, v in nnx.to_flat_state(nnx.state(filter))
        } == {("filter", False)}


@pytest.mark.parametrize("name", LONG)
def test_longer_than_the_maximum_is_a_user_error(name):
    mixer, x = build(CONFIGS[name]), inputs(0, 1, MAXIMUM + 1)
    assert CONFIGS[name].traits.maximum_length == MAXIMUM and not CONFIGS[name].traits.exact_causality
    assert jnp.all(jnp.isfinite(mixer(x[:, :MAXIMUM]).hidden))
    with pytest.raises(UserError, match=f"{MAXIMUM + 1} tokens.*maximum_length of {MAXIMUM}"):
        mixer(x)
    with pytest.raises(UserError, match="maximum_length"):
        mixer.extend(x, mixer.init_state(1, 200))


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("chunk", [1, 20])
def test_stream_past_its_capacity_reads_nan_inside_jit(name, chunk):
    mixer, x = build(CONFIGS[name]), inputs(0, 1, 40)
    expected, state, out = mixer(x).hidden, mixer.init_state(1, 30), []
    extend = jax.jit(mixer.extend)
    for start in range(0, 40, chunk):
        y, state = extend(x[:, start : start + chunk], state)
        out.append(y.hidden)
    got = jnp.concatenate(out, axis=1)
    assert error(got[:, :30], expected[:, :30]) < TOLERANCE
    assert jnp.all(jnp.isnan(got[:, 30:]))
    with pytest.raises(UserError, match="gave this state 40 tokens; it has room for 30"):
        mixer.extend(x[:, :1], state)


def test_state_sizes():
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(build(config).init_state(1, 32)))
        for name, config in CONFIGS.items()
    }
    cursor, long = 2, 32 + 1  # position and segment; segments of the slots, and their count
    assert sizes == {
        "short": 3 * WIDTH + cursor,
        "one tap": cursor,
        "base": 2 * WIDTH + cursor,
        "base implicit": 32 * WIDTH + long + cursor,
        "base activated": 2 * WIDTH + cursor,
        "base explicit": 32 * WIDTH + long + cursor,
        "gated": 2 * 2 * WIDTH + cursor,
        "hyena": 2 * 3 * WIDTH + 32 * WIDTH + long + cursor,
    }


def test_initialisation():
    taps = ShortConvolution(kernel=4).build(500, Place(0, 1), nnx.Rngs(params=jax.random.key(0))).convolution.taps[...]
    assert float(jnp.max(jnp.abs(taps))) <= 0.5
    assert (
        abs(float(jnp.std(taps)) - 0.5 / 3**0.5) < 0.02
    )  # uniform on (-1/2, 1/2) times 2/2: standard deviation bound / sqrt(3)
    out = {
        depth: GatedConvolution().build(64, Place(0, depth), nnx.Rngs(params=jax.random.key(0))).output.kernel[...]
        for depth in (1, 8)
    }
    assert abs(float(jnp.std(out[1]) / jnp.std(out[8])) - 8**0.5) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_under_vmap_and_survives_json(name):
    config = CONFIGS[name]
    assert from_json(to_json(config)) == config

    def make(key, index):
        return config.build(WIDTH, Place(index, 3), nnx.Rngs(params=key))

    stacked = jax.jit(jax.vmap(make))(jax.random.split(jax.random.key(0), 3), jnp.arange(3))
    x = inputs(0, 1, 8)
    out, _ = jax.lax.scan(lambda x, mixer: (mixer(x).hidden, None), x, stacked)
    step = jax.jit(lambda mixer, x: mixer(x).hidden)
    for index in range(3):
        x = step(jax.tree.map(lambda leaf, index=index: leaf[index], stacked), x)
    assert error(out, x) < TOLERANCE


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ShortConvolution(kernel=0),
        lambda: BaseConvolution(kernel=-1),
        lambda: BaseConvolution(maximum_length=0),
        lambda: GatedConvolution(expansion=0),
        lambda: GatedConvolution(expansion=3).build(5, Place(), nnx.Rngs(params=jax.random.key(0))),
        lambda: Hyena(filter_order=0),
        lambda: Hyena(heads=5).build(6, Place(), nnx.Rngs(params=0)),
        lambda: Hyena(maximum_length=-5),
    ],
)
def test_impossible_configs(wrong):
    with pytest.raises(UserError, match=r"=-?[0-9]"):
        wrong()
