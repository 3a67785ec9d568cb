"""Scheduled attention's TPU kernels, simulated: values and all gradients against their plain form (tiles_by_einsum);
refusals."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.masks import EarlierBlock, IsOrdinary, SameBlock, SameSegment, causal
from recollect.pallas_kernels.scheduled_attention import flash_vjp, tpu
from recollect.pallas_kernels.softmax_attention import softmax_attention
from tests.pallas_kernels import tiles_by_einsum

CLOSE = 2e-6  # rms, fp32: a few roundings, in sums over at most 1,000 keys


def error(found, expected) -> float:
    """rms(difference) / rms(expected) over what is finite, which must be the same in both."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    found, expected = np.where(finite, found, 0), np.where(finite, expected, 0)
    size, off = (np.sqrt(np.mean(x**2)) for x in (expected, found - expected))
    return float(off / size) if size else float(off)


def races_found() -> bool:
    """Whether the simulator's last kernels raced; it only prints it, and the flag is internal."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


@dataclasses.dataclass(frozen=True)
class Odd:
    """A mask with every operation that an expression may have; its bounds know nothing."""

    fields = frozenset({"positions", "kinds"})

    def allows(self, query: Any, key: Any) -> Any:
        far = query.positions - key.positions >= 9
        return ((key.positions <= query.positions) & ~(far & (key.kinds == 1))) | (
            (key.kinds == 2) & (query.kinds != 0)
        )

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return np.True_, np.False_


@dataclasses.dataclass(frozen=True)
class All:
    """No mask, as numpy's True."""

    fields: frozenset[str] = frozenset()

    def allows(self, query: Any, key: Any) -> Any:
        return np.True_

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return np.True_, np.True_


def attended(kernels, arrays, dtype=None, times=1, **call):
    """Output, log-sum-exp, and gradients by all of `arrays` of a sum that weighs both unevenly; of several runs, one
    after another."""
    arrays = {name: x if dtype is None or name == "sinks" else x.astype(dtype) for name, x in arrays.items()}

    def run(arrays):
        o, lse = flash_vjp.attend(kernels, **arrays, **call)
        weights = jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(o * weights) + jnp.sum(finite * weights[..., 0]), (o, lse)

    gradient = jax.jit(jax.grad(run, has_aux=True))
    found = [{"o": o, "lse": lse, **gradients} for gradients, (o, lse) in (gradient(arrays) for _ in range(times))]
    return found if times > 1 else found[0]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def documents(b: int, t: int) -> np.ndarray:
    """Rows of up to three documents, with padding at the start of the first, and at the end."""
    rows = np.sort(np.random.default_rng(t).integers(1, 4, (b, t)), axis=1).astype(np.int32)
    rows[0, : min(3, t // 4)] = 0
    rows[:, t - t // 8 :] = 0
    return rows


def plain(t, h=4, g=2, k=8, v=12, tiles=(16, 16), mask="before", window=None, packed=True, sinks=False, b=2):
    """Arrays and a call of self-attention, packed documents known on the device only."""
    arrays = {"q": normal(1, b, t, h, k), "k": normal(2, b, t, g, k), "v": normal(3, b, t, g, v)}
    if sinks:
        arrays["sinks"] = normal(4, h)
    fields: dict[str, Any] = {"positions": np.arange(t)[None], "order": np.arange(t)[None]}
    if packed:
        fields["segments"] = jnp.asarray(documents(b, t))
    fields["kinds"] = jnp.asarray(np.random.default_rng(5).integers(0, 3, (b, t)))
    fields["blocks"], fields["token_types"] = fields["positions"] // 9, (fields["positions"] % 9 == 8).astype(np.int32)
    before = causal(window, segmented=packed, ordered=True)
    current = causal(segmented=packed, ordered=True) & SameBlock() & IsOrdinary()
    masks = {"before": before, "odd": Odd(), "all": All(), "own": current}
    rest = {"query_tile": tiles[0], "key_tile": tiles[1], "scale": k**-0.5}
    return arrays, {"mask": masks[mask], "query_fields": fields, "key_fields": fields, **rest}


def gathered(n, s, g=3, k=8, v=12, tiles=(16, 16), b=2):
    """Queries sorted by key head and position, some of them padding; the last key head has none."""
    rng = np.random.default_rng(n)
    arrays = {"q": normal(1, b, n, 1, k), "k": normal(2, b, s, g, k), "v": normal(3, b, s, g, v)}
    key_heads = np.sort(rng.integers(0, g - 1, (b, -(-n // tiles[0]))), axis=1)
    query = {
        "positions": jnp.asarray(np.sort(rng.integers(0, s, (b, n)), axis=1)),
        "segments": jnp.ones((b, n), jnp.int32).at[:, -3:].set(0),
    }
    key = {"positions": np.arange(s)[None], "segments": np.ones((1, s), np.int32)}
    rest = {
        "query_tile": tiles[0],
        "key_tile": tiles[1],
        "scale": k**-0.5,
        "key_heads": jnp.asarray(key_heads, jnp.int32),
    }
    return arrays, {"mask": causal(segmented=True), "query_fields": query, "key_fields": key, **rest}


def landmarks(t, blocks, block, slots, h=4, g=2, k=8, v=12, query_tile=16, packed=True, b=2):
    """Queries spread over so many landmark blocks and one more."""
    there = (np.arange(blocks * slots) % slots <= block)[None, :, None, None]
    keys, values = (normal(i, b, blocks * slots, g, d) * there for i, d in ((2, k), (3, v)))
    query: dict[str, Any] = {"blocks": (np.arange(t) * (blocks + 1) // t)[None]}
    key: dict[str, Any] = {"blocks": np.repeat(np.arange(blocks), slots)[None]}
    if packed:
        query["segments"] = jnp.asarray(documents(b, t))
        key["segments"] = jnp.asarray(
            np.repeat(np.sort(np.random.default_rng(3).integers(1, 4, (b, blocks)), axis=1), slots, axis=1)
        )
    rest = {"query_tile": query_tile, "key_tile": slots, "scale": k**-0.5, "block": block}
    arrays = {"q": normal(1, b, t, h, k), "k": keys, "v": values}
    return arrays, {
        "mask": EarlierBlock() & SameSegment() if packed else EarlierBlock(),
        "query_fields": query,
        "key_fields": key,
        **rest,
    }


CASES = {
    "window, sinks": (plain, {"t": 63, "window": 20, "sinks": True}, "values"),
    "one document, heads of whole lanes": (
        plain,
        {"t": 60, "h": 2, "k": 128, "v": 128, "packed": False, "tiles": (16, 32), "b": 1},
        "values",
    ),
    "any expression": (plain, {"t": 40, "h": 2, "g": 1, "mask": "odd"}, "races"),
    "gathered": (gathered, {"n": 60, "s": 40}, "races"),
    "landmark blocks": (landmarks, {"t": 40, "blocks": 3, "block": 13, "slots": 16, "h": 2, "g": 1}, "races"),
}
MORE = {
    "no mask": (plain, {"t": 32, "h": 1, "g": 1, "mask": "all"}, "values"),
    "one token": (plain, {"t": 1, "sinks": True}, "values"),
    "257": (plain, {"t": 257, "tiles": (128, 128), "sinks": True}, "values"),
    "1000": (plain, {"t": 1000, "tiles": (256, 128), "window": 100, "h": 2, "g": 1, "b": 1}, "values"),
    "races": (plain, {"t": 100, "window": 30, "tiles": (32, 16), "sinks": True}, "races"),
    "own blocks": (plain, {"t": 100, "mask": "own"}, "values"),
    "own blocks of one document": (plain, {"t": 100, "mask": "own", "packed": False}, "races"),
    "gathered 257": (gathered, {"n": 257, "s": 100, "tiles": (32, 16)}, "values"),
    "gathered narrow": (gathered, {"n": 64, "s": 33, "k": 128, "v": 128}, "values"),
    "landmark blocks 8": (
        landmarks,
        {"t": 257, "blocks": 37, "block": 8, "slots": 16, "query_tile": 64, "b": 1},
        "values",
    ),
    "landmark blocks 8, one document": (
        landmarks,
        {"t": 100, "blocks": 7, "block": 8, "slots": 16, "packed": False},
        "races",
    ),
    "landmark blocks 50": (landmarks, {"t": 257, "blocks": 11, "block": 50, "slots": 64, "query_tile": 128}, "values"),
    "landmark blocks 255": (landmarks, {"t": 63, "blocks": 3, "block": 255, "slots": 256}, "values"),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.wide) for name in MORE)])
def test_the_kernels_are_their_plain_form(name):
    make, sizes, how = (CASES | MORE)[name]
    arrays, call = make(**sizes)
    with dispatch.interpreted(how):
        found = attended(tpu, arrays, **call)
        assert how == "values" or not races_found()
    expected = attended(tiles_by_einsum, arrays, **call)
    assert found["lse"].dtype == jnp.float32
    for name, x in expected.items():
        assert error(found[name], x) < CLOSE, name


@pytest.mark.parametrize(
    "together", [32, pytest.param(16, marks=pytest.mark.wide), pytest.param(48, marks=pytest.mark.wide)]
)
def test_landmark_blocks_taken_together_are_those_taken_one_by_one(together, monkeypatch):
    """Also where the last blocks of a tile are not there: 5 blocks in tiles of 1, 2 and 3."""
    monkeypatch.setattr(tpu, "ROWS_TOGETHER", together)
    arrays, call = landmarks(40, 5, 8, 16, h=2, g=1)
    with dispatch.interpreted():
        found = attended(tpu, arrays, **call)
    for name, x in attended(tiles_by_einsum, arrays, **call).items():
        assert error(found[name], x) < CLOSE, name


HALF = {
    "plain": (plain, {"t": 40, "window": 20, "sinks": True}),
    "gathered": (gathered, {"n": 60, "s": 40}),
    "landmark blocks": (landmarks, {"t": 60, "blocks": 5, "block": 13, "slots": 16}),
}


@pytest.mark.parametrize("name", ["plain", *(pytest.param(name, marks=pytest.mark.wide) for name in list(HALF)[1:])])
def test_half_precision(name):
    make, sizes = HALF[name]
    arrays, call = make(**sizes)
    arrays = {name: x if name == "sinks" else x.astype(jnp.bfloat16) for name, x in arrays.items()}
    with dispatch.interpreted():
        found = attended(tpu, arrays, **call)
    assert all(found[name].dtype == jnp.bfloat16 for name in ("o", "q", "k", "v")) and found["lse"].dtype == jnp.float32
    for name, x in attended(tiles_by_einsum, arrays, jnp.float32, **call).items():
        assert error(found[name], x) < {"o": 0.005, "lse": 1e-5}.get(name, 0.01), name


@pytest.mark.wide
def test_half_precision_is_as_close_as_the_plain_form():
    arrays, call = plain(257, window=100, k=32, v=32, tiles=(128, 128))
    arrays = {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}
    exact = attended(tiles_by_einsum, arrays, jnp.float32, **call)
    with dispatch.interpreted():
        found = attended(tpu, arrays, **call)

    def run(arrays):
        segments, positions = call["query_fields"]["segments"], jnp.broadcast_to(jnp.arange(257), (2, 257))
        o, lse = softmax_attention(
            **arrays, window=100, query_segments=segments, query_positions=positions, return_lse=True, backend="xla"
        )
        weights = jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)
        return jnp.sum(o * weights) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * weights[..., 0]), o

    gradients, o = jax.jit(jax.grad(run, has_aux=True))(arrays)
    for name, x in {"o": o, **gradients}.items():
        assert error(found[name], exact[name]) < max(0.005, 2 * error(x, exact[name])), name


def test_what_no_schedule_names_is_not_read():
    """Keys that all queries have left behind may be NaN: their tiles are not visited, and their own gradients are 0."""
    arrays, call = plain(48, h=1, g=1, packed=False, window=8, b=1)
    call |= {"mask": causal(8), "query_fields": {**call["query_fields"], "positions": np.arange(48)[None] + 30}}
    unseen = np.arange(48)[None, :, None, None] < 16
    arrays |= {name: jnp.where(unseen, jnp.nan, arrays[name]) for name in ("k", "v")}
    with dispatch.interpreted():
        found = attended(tpu, arrays, **call)
    assert np.isfinite(found["lse"][:, :25]).all() and np.isneginf(found["lse"][:, 25:]).all()
    assert all(np.isfinite(found[name]).all() for name in ("o", "q", "k", "v"))
    assert not found["o"][:, 25:].any() and not found["q"][:, 25:].any()
    assert not found["k"][:, :23].any() and not found["v"][:, :23].any() and found["k"][:, 24:].any()


def test_the_same_bits_twice():
    arrays, call = plain(32, h=2, g=1, sinks=True)
    with dispatch.interpreted():
        first, second = attended(tpu, arrays, times=2, **call)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.wide
@pytest.mark.parametrize("packed", [False, True])
def test_members_of_a_population_are_calls_of_their_own(packed):
    """Under vmap, with documents of each member's own too, whose visits differ."""
    arrays, call = plain(32, h=2, g=1, b=1)
    segments = jnp.stack([call["query_fields"]["segments"], call["query_fields"]["segments"][:, ::-1]])
    members = {name: jnp.stack([x, 0.5 * x]) for name, x in arrays.items()}

    def member(kernels, arrays, segments):
        fields = {**call["query_fields"], "segments": segments if packed else np.ones((1, 32), np.int32)}
        return attended(kernels, arrays, **{**call, "query_fields": fields, "key_fields": fields})

    with dispatch.interpreted():
        found = jax.vmap(functools.partial(member, tpu))(members, segments)
    for i in range(2):
        expected = member(tiles_by_einsum, jax.tree.map(lambda x, i=i: x[i], members), segments[i])
        for name, x in expected.items():
            assert error(found[name][i], x) < CLOSE, name


def test_tiles_fit_lengths_windows_and_types():
    sizes = functools.partial(tpu.tile_sizes, k=64, v=64, dtype=jnp.bfloat16)
    assert (
        sizes(1, 1) == (16, 16)
        and sizes(64, 64) == (64, 64)
        and sizes(257, 257) == (384, 384)
        and sizes(1000, 1000) == (512, 512)
    )
    assert sizes(600, 2048) == (384, 512) and sizes(8192, 2048) == (256, 512)
    assert (
        sizes(8192, 8192) == (1024, 512)
        and sizes(8192, 8192, window=1024) == (512, 512)
        and sizes(8192, 8192, window=64) == (512, 256)
    )
    assert tpu.tile_sizes(8192, 8192, 256, 64, jnp.bfloat16) == (512, 512) and tpu.tile_sizes(
        2048, 2048, 64, 64, jnp.float32
    ) == (256, 256)
    assert [sizes(2048, 2048, block=block) for block in (8, 15, 50, 63, 255)] == [
        (512, x) for x in (16, 16, 64, 64, 256)
    ]


@pytest.mark.parametrize(
    ("q", "k", "v", "dtypes", "more", "reason"),
    [
        (
            (1, 64, 2, 16),
            (1, 64, 2, 16),
            (1, 64, 2, 16),
            ("float16",) * 3,
            {},
            "all be bfloat16 or all float32; got float16",
        ),
        (
            (1, 64, 2, 16),
            (1, 64, 2, 16),
            (1, 64, 2, 16),
            ("float32", "float32", "bfloat16"),
            {},
            "got float32, float32, bfloat16",
        ),
        (
            (1, 64, 2, 257),
            (1, 64, 2, 257),
            (1, 64, 2, 16),
            ("float32",) * 3,
            {},
            "at most 256 dimensions; got 257 and 16",
        ),
        (
            (1, 2048, 2, 16),
            (1, 2048, 2, 16),
            (1, 2048, 2, 16),
            ("float32",) * 3,
            {"block": 512},
            "at most 511 keys; got 512",
        ),
        ((1, 2**18, 2, 256), (1, 2**18, 2, 256), (1, 2**18, 2, 256), ("bfloat16",) * 3, {}, "bytes of scalar memory"),
        (
            (1, 2**17, 1, 16),
            (1, 2**17, 33, 16),
            (1, 2**17, 33, 16),
            ("float32",) * 3,
            {"gathered": True},
            "more than the 8192",
        ),
    ],
)
def test_what_it_refuses_it_explains(q, k, v, dtypes, more, reason):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip((q, k, v), dtypes, strict=True)]
    assert reason in tpu.refuses(*arrays, **more)


@pytest.mark.parametrize(
    ("b", "t", "h", "d", "more"), [(64, 64, 1, 64, {}), (8, 16384, 16, 128, {}), (4, 4096, 16, 64, {"block": 8})]
)
def test_it_serves_the_rest(b, t, h, d, more):
    x = jax.ShapeDtypeStruct((b, t, h, d), jnp.bfloat16)
    assert tpu.refuses(x, x, x, **more) is None


def test_visits_that_do_not_fit_are_told():
    arrays, call = plain(8192, h=1, g=1, tiles=(16, 16), mask="odd", b=1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    with dispatch.interpreted(), pytest.raises(ValueError, match="983040 are left for them"):
        jax.eval_shape(lambda arrays: flash_vjp.attend(tpu, **arrays, **call), shapes)


@pytest.mark.parametrize(
    "make", [functools.partial(plain, 32, h=2, g=1, sinks=True, b=4), functools.partial(gathered, 40, 32, b=4)]
)
@pytest.mark.wide
def test_sequences_go_apart_where_their_visits_do_not_fit_together(make, monkeypatch):
    arrays, call = make()
    with dispatch.interpreted():
        expected = attended(tpu, arrays, **call)
        monkeypatch.setattr(tpu, "SCALAR_BYTES", 40)
        assert "scan" in str(jax.make_jaxpr(lambda arrays: flash_vjp.attend(tpu, **arrays, **call))(arrays))
        found = attended(tpu, arrays, **call)
    for name, x in expected.items():
        assert error(found[name], x) < CLOSE, name
