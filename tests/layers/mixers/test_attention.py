"""Softmax attention against the formula, and over documents, padding and streams. Helpers here serve the family's
other tests too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import Context, Mixer, MixerConfig, Place
from recollect.layers.mixers.attention import Attention
from recollect.layers.mixers.sliding_window import SlidingWindow
from recollect.layers.modules.positions import LearnedPositions, Rotary

WIDTH = 16
CLOSE = 5e-6  # rms, fp32, through projections and a softmax

ROW = [0, 1, 1, 0, 1, 1, 1, 2, 2, 0, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 3, 3, 3, 0]
"""A row with padding before, inside, between and after documents of 5, 10 and 3 tokens."""


def error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    size = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((found - expected) ** 2)) / size) if size else float(np.max(np.abs(found)))


def build(config: MixerConfig) -> Mixer:
    """The mixer with every parameter drawn anew, so that none stays at a special start (zero biases, gains of one)."""
    mixer = config.build(WIDTH, Place(), nnx.Rngs(params=jax.random.key(0)))
    leaves, tree = jax.tree.flatten(mixer)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(
        tree, [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def tokens(b: int, t: int) -> jax.Array:
    return jax.random.normal(jax.random.key(t), (b, t, WIDTH))


@jax.jit
def full(mixer: Mixer, x: jax.Array, context: Context = Context()) -> jax.Array:
    return mixer(x, context).hidden


@jax.jit
def whole(mixer: Mixer, x: jax.Array, context: Context = Context()):
    return mixer(x, context)


@jax.jit
def extend(mixer: Mixer, x: jax.Array, state, context: Context = Context()):
    out, state = mixer.extend(x, state, context)
    return out.hidden, state


@jax.jit
def weight_gradients(mixer: Mixer, x: jax.Array, context: Context):
    """Gradients of the outputs of real tokens, weighed unevenly, and of the auxiliary losses."""

    def loss(mixer):
        out = mixer(x, context)
        weights = jnp.cos(jnp.arange(out.hidden.size, dtype=jnp.float32)).reshape(out.hidden.shape)
        real = 1 if context.segments is None else (context.segments != 0)[..., None]
        return jnp.sum(jnp.where(real, out.hidden * weights, 0)) + sum(out.losses.values())

    return jax.grad(loss)(mixer)


def assert_documents_stand_alone(config: MixerConfig) -> None:
    """Documents packed with padding that is NaN give what they give alone; padding leaves weight gradients as they
    are."""
    mixer, segments = build(config), jnp.array([ROW])
    x = jnp.where(segments[..., None] != 0, tokens(1, len(ROW)), jnp.nan)
    packed = full(mixer, x, Context(segments=segments))
    for document in (1, 2, 3):
        places = np.flatnonzero(np.array(ROW) == document)
        assert error(packed[:, places], full(mixer, x[:, places])) < CLOSE
    zeroed = jnp.where(segments[..., None] != 0, x, 5.0)
    got, expected = (weight_gradients(mixer, y, Context(segments=segments)) for y in (x, zeroed))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_streams(config: MixerConfig, sizes: tuple[int, ...] = (4, 4, 9, 4, 3)) -> None:
    """A row fed in chunks gives the full call: documents end and begin inside chunks, padding stands anywhere."""
    mixer = build(config)
    segments = jnp.array([ROW, ROW[::-1]])
    segments = segments.at[1].set(
        jnp.where(segments[1] == 0, 0, 4 - segments[1])
    )  # the reversed row counts its documents up
    x = jnp.where(segments[..., None] != 0, tokens(2, len(ROW)), jnp.nan)
    expected = full(mixer, x, Context(segments=segments))
    state, parts, start = mixer.init_state(2, len(ROW)), [], 0
    assert sum(sizes) == len(ROW)
    for size in sizes:
        hidden, state = extend(
            mixer, x[:, start : start + size], state, Context(segments=segments[:, start : start + size])
        )
        parts.append(hidden)
        start += size
    real = segments != 0
    assert error(jnp.concatenate(parts, axis=1)[real], expected[real]) < CLOSE


def by_formula(mixer, x: np.ndarray, seen: np.ndarray, key_heads: int) -> np.ndarray:
    """One row (t, d) in float64: heads of rotated, normalised queries and keys; Rotary(base=100) over all
    dimensions, in halves."""

    def project(linear):
        return x @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...], np.float64)

    def place(heads, norm):
        heads = (
            heads / np.sqrt(np.mean(heads**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(norm.gain[...], np.float64)
        )
        half = heads.shape[-1] // 2
        turn = np.exp(1j * np.arange(len(x))[:, None] * 100.0 ** (-np.arange(half) / half))[:, None, :]
        turned = (heads[..., :half] + 1j * heads[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    t, dim = len(x), mixer.head_dim
    q = place(project(mixer.query).reshape(t, -1, dim), mixer.query_norm)
    k = place(project(mixer.key).reshape(t, key_heads, dim), mixer.key_norm)
    v = project(mixer.value).reshape(t, key_heads, dim)
    outs = []
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // key_heads)
        weights = np.where(seen, np.exp(q[:, head] @ k[:, shared].T / np.sqrt(dim)), 0)
        outs.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, shared])
    return np.concatenate(outs, axis=1) @ np.asarray(mixer.output.kernel[...], np.float64) + np.asarray(
        mixer.output.bias[...]
    )


def test_follows_the_formula():
    mixer = build(
        Attention(heads=4, key_heads=2, head_dim=6, positions=Rotary(base=100.0), query_key_norm=True, bias=True)
    )
    x = tokens(1, 9)
    expected = by_formula(mixer, np.asarray(x[0], np.float64), np.tril(np.ones((9, 9), bool)), 2)
    assert error(full(mixer, x)[0], expected) < CLOSE


CONFIGS = [
    Attention(heads=2, positions=Rotary(fraction=0.5)),
    Attention(heads=4, key_heads=1, positions=LearnedPositions(maximum=24), query_key_norm=True, bias=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config.positions).__name__)
def test_documents_stand_alone(config):
    assert_documents_stand_alone(config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config.positions).__name__)
def test_streams(config):
    assert_streams(config)


def test_streams_without_segments_one_token_at_a_time():
    mixer, x = build(CONFIGS[0]), tokens(2, 7)
    state, parts = mixer.init_state(2, 7), []
    for t in range(7):
        hidden, state = extend(mixer, x[:, t : t + 1], state)
        parts.append(hidden)
    assert error(jnp.concatenate(parts, axis=1), full(mixer, x)) < CLOSE


def test_later_tokens_change_nothing_before():
    mixer, x = build(CONFIGS[0]), tokens(1, 140)
    changed = full(mixer, x.at[:, 130:].add(1.0))
    assert np.array_equal(changed[:, :130], full(mixer, x)[:, :130])
    assert not np.array_equal(changed[:, 130:], full(mixer, x)[:, 130:])


def test_positions_of_the_context_are_used():
    mixer, x = build(Attention(heads=2, positions=Rotary())), tokens(1, 8)
    spread = full(mixer, x, Context(positions=3 * jnp.arange(8, dtype=jnp.int32)[None]))
    moved = full(mixer, x, Context(positions=11 + jnp.arange(8, dtype=jnp.int32)[None]))
    assert error(moved, full(mixer, x)) < CLOSE  # rotation knows distances only
    assert error(spread, full(mixer, x)) > 0.01


def test_learned_positions_reach_queries_and_keys_only():
    mixer = build(Attention(heads=2, positions=LearnedPositions(maximum=4)))
    x = tokens(1, 4)
    places = jnp.array([[2]])
    assert (
        error(full(mixer, x[:, :1], Context(positions=places)), full(mixer, x[:, :1])) == 0
    )  # one key: its value, whatever the scores
    swapped = full(mixer, x, Context(positions=jnp.array([[0, 1, 3, 3]])))
    assert error(swapped[:, 3], full(mixer, x)[:, 3]) > 1e-3


def test_a_table_is_not_read_past_its_end():
    config = Attention(positions=LearnedPositions(maximum=4))
    mixer = build(config)
    assert config.traits.maximum_length == 4
    with pytest.raises(UserError, match="5 tokens"):
        mixer(tokens(1, 5))
    with pytest.raises(UserError, match="5 tokens"):
        mixer.init_state(1, 5)
    _, state = extend(mixer, tokens(1, 4), mixer.init_state(1, 4))
    hidden, _ = extend(mixer, tokens(1, 1), state, Context(segments=jnp.zeros((1, 1), jnp.int32)))
    assert np.all(np.isfinite(hidden))  # padding after a full table stands past its end


def test_a_stream_past_the_table_is_refused():
    """A window slides over any number of tokens; its position table ends. A new document starts at its beginning."""
    mixer, x = build(SlidingWindow(window=3, heads=2, positions=LearnedPositions(maximum=4))), tokens(1, 6)
    _, state = extend(mixer, x[:, :3], mixer.init_state(1, 4))
    mixer.extend(x[:, :1], state)
    with pytest.raises(UserError, match=r"document of this stream has 5 tokens so far; the model has positions for 4"):
        mixer.extend(x[:, :2], state)
    mixer.extend(x[:, :2], state, Context(segments=jnp.full((1, 2), 5)))
    _, state = extend(mixer, x[:, :3], state)
    with pytest.raises(UserError, match="has 6 tokens so far"):
        mixer.extend(x[:, :1], state, Context(segments=jnp.zeros((1, 1), jnp.int32)))


def test_half_precision_stays_near_and_its_cache_too():
    mixer, x = build(CONFIGS[0]), tokens(2, 12)
    low = full(mixer, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert error(low, full(mixer, x)) < 0.02  # 8 bits of fraction, four products deep
    state = mixer.init_state(2, 12, jnp.bfloat16)
    assert state.keys.dtype == jnp.bfloat16
    hidden, _ = extend(mixer, x.astype(jnp.bfloat16), state)
    assert error(hidden, low) < 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(heads=0), "heads=0"),
        (lambda: Attention(heads=4, key_heads=3), "key_heads=3"),
        (lambda: Attention(head_dim=0), "head_dim=0"),
        (lambda: build(Attention(heads=3)), "does not divide the model width 16"),
        (lambda: build(Attention(heads=16, positions=Rotary())), "too few"),
    ],
)
def test_impossible_configs_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_heads_may_be_wider_than_the_model():
    assert build(Attention(heads=3, head_dim=32)).query.kernel[...].shape == (WIDTH, 96)
