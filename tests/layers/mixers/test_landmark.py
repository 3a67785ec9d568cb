"""The landmark mixer: its projections, positions and cache around the kernels, which have tests of their own."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers import Landmark
from recollect.layers.mixer import Context, Place
from recollect.layers.modules.positions import LearnedPositions, Rotary
from recollect.layers.state import measured_reads
from recollect.pallas_kernels import dispatch
from tests.pallas_kernels import landmark_oracle

WIDTH, T = 16, 23
CONFIG = Landmark(block=4, heads=4, key_heads=2, positions=Rotary())


def error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def build(config=CONFIG):
    mixer = config.build(WIDTH, Place(0, 2), nnx.Rngs(params=jax.random.key(0)))
    graph, state = nnx.split(mixer)
    state = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state)
    return nnx.merge(graph, state)


def inputs(b=1):
    return jnp.asarray(np.random.default_rng(0).normal(size=(b, T, WIDTH)), jnp.float32)


def projections(mixer, x):
    """q (b, t, 4, 4), k and v (b, t, 2, 4) in float64."""
    return tuple(
        np.asarray(x @ linear.kernel[...], np.float64).reshape(*x.shape[:2], -1, 4)
        for linear in (mixer.query, mixer.key, mixer.value)
    )


def plain():
    count, ones = np.arange(T)[None], np.ones((1, T), int)
    return count, count, ones, ones


def test_the_layer_is_the_oracle():
    mixer, x = build(), inputs()
    q, k, v = projections(mixer, x)
    q, k = (
        np.stack([[[landmark_oracle.rotate(y, i) for y in token] for i, token in enumerate(row)] for row in z])
        for z in (q, k)
    )
    weights = landmark_oracle.training_weights(q, k, 4, 4**-0.5, *plain())
    o = np.einsum("bhts,bshv->bthv", weights, np.repeat(v, 2, axis=2)).reshape(1, T, WIDTH)
    expected = o @ np.asarray(mixer.output.kernel[...], np.float64)
    assert error(jax.jit(lambda x: mixer(x).hidden)(x), expected) < 5e-6
    # The same by the path for rows with segments.
    found = jax.jit(lambda x: mixer(x, Context(segments=jnp.full((1, T), 7))).hidden)(x)
    assert error(found, expected) < 5e-6


def test_retrieval_is_the_oracle_with_the_same_parameters():
    config = chz.replace(CONFIG, retrieve=2)
    trained, reading, x = build(), build(config), inputs()
    assert jax.tree.structure(nnx.state(trained)) == jax.tree.structure(nnx.state(reading))
    q, k, v = projections(reading, x)
    o, _ = landmark_oracle.retrieval(q, k, v, 4, 2, 4**-0.5, *plain())
    expected = o.reshape(1, T, WIDTH) @ np.asarray(reading.output.kernel[...], np.float64)
    found = jax.jit(lambda x: reading(x).hidden)(x)
    assert error(found, expected) < 1e-5
    # Three blocks of five: up to there nothing is left out.
    assert error(found[:, :15], jax.jit(lambda x: trained(x).hidden)(x)[:, :15]) < 1e-5


def test_the_cache_holds_unrotated_keys_of_all_tokens():
    mixer, x = build(), inputs(b=2)
    state = mixer.init_state(2, 30)
    segments = jnp.ones((2, T), jnp.int32).at[1, :6].set(0)
    _, state = jax.jit(lambda x, state: mixer.extend(x, state, Context(segments=segments)))(x, state)
    _, k, v = projections(mixer, x)
    np.testing.assert_allclose(state.keys[0, :T], k[0], atol=1e-5)
    np.testing.assert_allclose(state.values[1, : T - 6], v[1, 6:], atol=1e-5)
    np.testing.assert_array_equal(state.positions[1, : T - 6], np.arange(T - 6))
    np.testing.assert_array_equal(np.asarray(state.segments).sum(axis=1), [T, T - 6])
    assert mixer.init_state(1, 9, jnp.bfloat16).keys.shape == (1, 9, 2, 4)  # every token, two key heads


def choices_of(config, platform, kind, dtype, tokens, cached=False):
    """(operation, backend) of what the mixer runs on for a device, packed rows or tokens against a cache."""
    graph, weights = nnx.split(config.build(WIDTH, Place(0, 2), nnx.Rngs(params=jax.random.key(0))))

    def run(weights, x):
        mixer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), weights))
        if cached:
            return mixer.extend(x, mixer.init_state(1, 40, dtype))[0].hidden
        return mixer(x, Context(segments=jnp.ones((1, tokens), jnp.int32))).hidden

    with dispatch.recorded_choices() as choices, dispatch.aimed_at(platform, kind):
        jax.eval_shape(run, weights, jax.ShapeDtypeStruct((1, tokens, WIDTH), dtype))
    return [(choice.operation, choice.backend) for choice in choices]


def test_what_it_runs_on():
    tpu, gpu = ("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100 80GB HBM3")
    assert choices_of(CONFIG, "cpu", "cpu", jnp.float32, T) == [("landmark_attention", "xla")]
    assert choices_of(CONFIG, *tpu, jnp.float32, T) == [("landmark_attention", "pallas_tpu")]
    assert choices_of(CONFIG, *gpu, jnp.bfloat16, T) == [("landmark_attention", "pallas_gpu")]
    assert choices_of(CONFIG, *gpu, jnp.float32, T) == [("landmark_attention", "xla")]
    # A prompt is a batch of queries against the cache; one token reads keys where they lie.
    assert choices_of(CONFIG, *tpu, jnp.float32, T, cached=True) == [("landmark_attention", "pallas_tpu")]
    assert choices_of(CONFIG, *tpu, jnp.float32, 1, cached=True) == [("landmark_attention", "xla")]
    reading = chz.replace(CONFIG, retrieve=2)
    assert choices_of(reading, *tpu, jnp.float32, T) == [("landmark_retrieval", "xla")]


@pytest.mark.parametrize("retrieve", [None, 2])
def test_tokens_one_by_one_are_the_whole(retrieve):
    mixer, x = build(chz.replace(CONFIG, retrieve=retrieve)), inputs(b=2)
    whole = jax.jit(lambda x: mixer(x).hidden)(x)
    state = mixer.init_state(2, 30)
    extend = jax.jit(lambda x, state: mixer.extend(x, state))
    out, state = extend(x[:, :17], state)
    found = [out.hidden]
    for i in range(17, T):
        out, state = extend(x[:, i : i + 1], state)
        found.append(out.hidden)
    assert error(jnp.concatenate(found, axis=1), whole) < 5e-6


def test_what_retrieval_reads():
    """Of each token that is streamed: its own block, the best block before it, and all landmarks before its block; and
    of the softmax over its block and those landmarks the share of what is read and of the block's own."""
    mixer, x = build(chz.replace(CONFIG, retrieve=1)), inputs()
    q, k, _ = projections(mixer, x)

    def step(state, x):
        with measured_reads() as layers:
            _, state = mixer.extend(x[:, None], state)
        return state, layers[0]

    _, reads = jax.jit(lambda x: jax.lax.scan(step, mixer.init_state(1, T), x.swapaxes(0, 1)))(x)
    turned = landmark_oracle.rotate
    for i in range(T):
        before, keys, shares = i // 5, [set(), set()], []
        current = [j for j in range(5 * before, i + 1) if j % 5 != 4]
        for h in range(4):
            g = h // 2
            score = {j: turned(q[0, i, h], i) @ turned(k[0, j, g], j) / 2 for j in range(i + 1)}
            stingy = turned(q[0, i, h], i - 5 * before + 5 * min(before, 2))
            fit = {n: stingy @ turned(k[0, 5 * n + 4, g], 4) / 2 for n in range(before - 1)}
            fit |= {n: score[5 * n + 4] for n in range(max(0, before - 1), before)}
            best = max(fit, key=fit.get) if fit else None
            keys[g] |= {*current, *(j for j in range(i) if j // 5 == best), *(5 * n + 4 for n in range(before))}
            main = landmark_oracle.softmax({j: score[j] for j in (*current, *(5 * n + 4 for n in range(before)))})
            shares.append(sum(weight for j, weight in main.items() if j in current or j // 5 == best))
        assert reads.keys[i, 0] == np.mean([len(read) for read in keys])
        np.testing.assert_allclose(reads.mass[i, 0], np.mean(shares), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, "block=0"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 4, "key_heads": 3}, "key_heads=3: must divide heads=4"),
        ({"key_heads": 0}, "key_heads=0"),
        ({"retrieve": 0}, "retrieve=0"),
        ({"positions": LearnedPositions()}, "Rotary positions or none"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Landmark(**settings)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="heads=3 does not divide the model width 16"):
        Landmark(heads=3).build(16, Place(), nnx.Rngs(params=jax.random.key(0)))


def test_it_asks_the_model_for_landmarks():
    assert Landmark(block=7).traits.landmark_block == 7
