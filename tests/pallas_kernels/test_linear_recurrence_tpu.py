"""The recurrence's scans as TPU kernels, simulated, against plain jnp in fp64 (chunk_scan_by_einsum); refusals;
how a call is cut."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.linear_recurrence import tpu, tpu_blocks, tpu_inverse
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks
from tests.pallas_kernels import chunk_scan_by_einsum
from tests.pallas_kernels.test_linear_recurrence import error

B, KEY, VALUE = 2, 24, 12  # four heads share lanes where no operand has fewer
# fp32 products of up to 64 terms. In bf16, o and y carry their own rounding (2e-3) and that of the scores; what only
# adds up products of bf16 values in fp32 (states, without erasing) is closer, see test_the_state_keeps_its_precision.
CLOSE = {"float32": 1e-5, "bfloat16": 0.005}


def some_chunks(
    c: int, t: int, h: int, decay: str, documents: bool, strength: float | None = None, keys: int = KEY
) -> Chunks:
    """Random decays of mean `strength`, by default weak ones with a few that forget everything; rows of up to four
    documents."""
    rng = np.random.default_rng(c + t)
    channels = {"none": None, "head": 1, "key": keys, "value": VALUE}[decay]
    total = None
    if channels is not None:
        g = -np.abs(rng.normal(size=(B, t // c, c, h, channels))) * (0.2 if strength is None else strength)
        if strength is None:
            g[rng.random(g.shape) < 0.02] = -10.0
        total = np.cumsum(g, axis=2).reshape(B, t, h, channels).astype(np.float32)
        total = jnp.asarray(np.moveaxis(total[..., 0], 1, 2) if decay == "head" else total)
    if not documents:
        return Chunks(c, decay, total)
    segments = np.sort(rng.integers(1, 5, (B, t)), axis=1).astype(np.int32)
    rows = segments.reshape(B, t // c, c)
    last = rows[:, :, -1]
    before = np.concatenate([np.ones((B, 1), np.int32), last[:, :-1]], axis=1)
    starts, ends, keeps = rows == before[:, :, None], rows == last[:, :, None], last == before
    as_given = [jnp.asarray(x, jnp.float32) for x in (starts.reshape(B, t), ends.reshape(B, t), keeps)]
    return Chunks(c, decay, total, jnp.asarray(segments), *as_given)


def some_rows(t: int, heads: int, channels: int, dtype: str, seed: int, size: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, t, heads, channels)) * size, dtype)


def exactly(run, *arrays, **settings):
    """Results of chunk_scan_by_einsum in fp64."""
    moving = {name: x for name, x in settings.items() if any(map(is_float, jax.tree.leaves(x)))}
    fixed = {name: x for name, x in settings.items() if name not in moving}
    with jax.enable_x64(True):
        arrays, moving = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)) if is_float(x) else x, (arrays, moving)
        )
        return jax.tree.map(np.asarray, jax.jit(lambda arrays, moving: run(*arrays, **moving, **fixed))(arrays, moving))


def is_float(x) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)


def compare(found, expected, allowed: dict[str, float], default: float) -> None:
    for name in ("o", "y", "state", "dots", "checkpoints"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.shape == other.shape, name
            assert error(one, other) < allowed.get(name, default), name


def races_found() -> bool:
    """Whether the simulator's last kernels raced; it only prints it, and the flag is internal."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def result(how, rows, chunks, **settings):
    """By the kernels and, in fp64, by definition."""
    with dispatch.interpreted(how):
        found = jax.jit(functools.partial(tpu.scan, **settings))(*rows, chunks)
    return found, exactly(chunk_scan_by_einsum.scan, *rows, chunks, **settings)


def scan_settings(h: int, t: int, dtype: str, **more):
    state = jnp.asarray(np.random.default_rng(9).normal(size=(B, h, KEY, VALUE)), jnp.float32)
    return {
        "heads": h,
        "scale": 0.7,
        "initial_state": state,
        "dot_with": some_rows(t, h, VALUE, dtype, 4),
        "checkpoint_every": 2,
        **more,
    }


# decay, tokens a chunk, chunks, documents, reverse, strict, dtype, heads of q, k, v out of 4, simulation
WALKS = [
    ("none", 8, 3, True, False, False, "float32", (4, 4, 4), "values"),
    ("none", 16, 3, True, True, True, "bfloat16", (2, 1, 4), "races"),
    ("head", 16, 3, True, False, True, "float32", (1, 2, 4), "races"),
    ("head", 24, 3, False, True, False, "bfloat16", (4, 4, 4), "values"),
    ("key", 64, 2, True, False, False, "float32", (2, 2, 4), "values"),
    ("key", 8, 3, False, True, True, "bfloat16", (4, 4, 4), "races"),
    ("value", 32, 2, True, True, False, "bfloat16", (4, 2, 2), "values"),
    ("value", 16, 3, False, False, True, "float32", (4, 4, 4), "races"),
]
WIDER = [
    (decay, c, 3, documents, reverse, strict, dtype, (4, 2, 1), "values")
    for decay in ("none", "head", "key", "value")
    for c in (16, 64)
    for documents in (False, True)
    for reverse in (False, True)
    for strict, dtype in ((False, "float32"), (True, "float32"), (False, "bfloat16"))
]


@pytest.mark.parametrize("case", WALKS + [pytest.param(case, marks=pytest.mark.wide) for case in WIDER], ids=str)
def test_a_chunk_scan_is_what_it_is_defined_to_be(case):
    decay, c, n, documents, reverse, strict, dtype, counts, how = case
    rows = [
        some_rows(c * n, count, d, dtype, i) for i, (count, d) in enumerate(zip(counts, (KEY, KEY, VALUE), strict=True))
    ]
    settings = scan_settings(4, c * n, dtype, reverse=reverse, strict=strict)
    found, expected = result(how, rows, some_chunks(c, c * n, 4, decay, documents), **settings)
    assert (
        found.o.dtype == jnp.dtype(dtype)
        and found.state.dtype == found.dots.dtype == found.checkpoints.dtype == jnp.float32
    )
    compare(found, expected, {}, CLOSE[dtype])
    if how == "races":
        assert not races_found()


@pytest.mark.parametrize("decay", ["head", "key", "value"])
def test_the_state_keeps_its_precision(decay):
    """And dots are taken before o is rounded; out_dtype says what o is rounded to."""
    rows = [some_rows(64, 2, d, "bfloat16", i) for i, d in enumerate((KEY, KEY, VALUE))]
    settings = scan_settings(2, 64, "bfloat16", out_dtype=jnp.float32)
    found, expected = result("values", rows, some_chunks(32, 64, 2, decay, False), **settings)
    assert found.o.dtype == jnp.float32
    compare(found, expected, {"state": 1e-4, "checkpoints": 1e-4}, 0.004)
    assert error(found.dots, jnp.einsum("bihv,bihv->bhi", found.o, settings["dot_with"].astype(jnp.float32))) < 1e-6


@pytest.mark.parametrize("decay", ["key", "value"])
@pytest.mark.parametrize("reverse", [False, True])
def test_decays_a_channel_at_their_bounds(decay, reverse):
    """One row decays by e^-10 at every token, the strongest that callers hand over, and nothing overflows; the other
    in half its chunks."""
    c, t = 32, 64
    rows = [some_rows(t, 2, d, "float32", i) for i, d in enumerate((KEY, KEY, VALUE))]
    some = some_chunks(c, t, 2, decay, False, strength=2.5).total
    all_ = -10.0 * (1.0 + jnp.arange(t) % c)[:, None, None]
    total = jnp.stack([jnp.broadcast_to(all_, some.shape[1:]), some[1].at[:c].set(0)])
    found, expected = result("values", rows, Chunks(c, decay, total), **scan_settings(2, t, "float32", reverse=reverse))
    for row in range(B):
        compare(*(jax.tree.map(lambda x, row=row: x[row], outcome) for outcome in (found, expected)), {}, 1e-5)


# decay, tokens a chunk, chunks, documents, reverse, reads, writes a second time, heads of keys out of 4, dtype,
# simulation
DELTAS = [
    ("none", 8, 3, True, False, True, False, 4, "bfloat16", "races"),
    ("head", 16, 3, True, False, True, False, 1, "float32", "values"),
    ("head", 16, 3, True, True, False, True, 2, "bfloat16", "races"),
    ("key", 32, 2, False, True, True, True, 4, "float32", "values"),
    ("key", 8, 3, True, False, True, True, 2, "bfloat16", "races"),
]
WIDER_DELTAS = [
    (decay, 16, 3, documents, reverse, reads, not reads, 2, dtype, "values")
    for decay in ("none", "head", "key")
    for documents in (False, True)
    for reverse in (False, True)
    for reads in (False, True)
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(
    "case", DELTAS + [pytest.param(case, marks=pytest.mark.wide) for case in WIDER_DELTAS], ids=str
)
def test_a_delta_scan_is_what_it_is_defined_to_be(case):
    decay, c, n, documents, reverse, reads, twice, count, dtype, how = case
    t, small = c * n, KEY**-0.5
    # w as small as the inverse of a chunk leaves it, or states would grow from chunk to chunk.
    w, u = some_rows(t, 4, KEY, dtype, 1, small * c**-0.5), some_rows(t, 4, VALUE, dtype, 2)
    k, q = some_rows(t, count, KEY, dtype, 3, small), some_rows(t, count, KEY, dtype, 4)
    settings = scan_settings(4, t, dtype, reverse=reverse, q=q if reads else None)
    del settings["dot_with"]
    if twice:
        settings["second"] = some_rows(t, count, KEY, dtype, 5, small), some_rows(t, 4, VALUE, dtype, 6)
    chunks = some_chunks(c, t, 4, decay, documents)
    with dispatch.interpreted(how):
        found = jax.jit(functools.partial(tpu.delta_scan, **settings))(w, u, k, chunks)
    assert found.y.dtype == jnp.dtype(dtype)
    compare(found, exactly(chunk_scan_by_einsum.delta_scan, w, u, k, chunks, **settings), {}, CLOSE[dtype])
    if how == "races":
        assert not races_found()


# decay, tokens a chunk, chunks, documents, heads of keys out of 4, channels of keys, strength, dtype, simulation
SYSTEMS = [
    ("none", 16, 2, True, 4, KEY, False, "float32", "values"),
    ("none", 64, 1, False, 2, 64, True, "bfloat16", "races"),
    ("head", 16, 3, True, 1, KEY, True, "float32", "races"),
    ("head", 64, 1, True, 4, 64, False, "bfloat16", "values"),
    ("key", 32, 2, True, 2, KEY, True, "float32", "values"),
    ("key", 64, 1, False, 4, 64, False, "bfloat16", "races"),
]
WIDER_SYSTEMS = [
    (decay, 32, 2, documents, count, d, documents, dtype, "values")
    for decay in ("none", "head", "key")
    for documents in (False, True)
    for count, d in ((4, 128), (2, 32))
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(
    "case", SYSTEMS + [pytest.param(case, marks=pytest.mark.wide) for case in WIDER_SYSTEMS], ids=str
)
def test_systems_are_solved(case):
    decay, c, n, documents, count, d, has_strength, dtype, how = case
    t, small = c * n, d**-0.5
    chunks = some_chunks(c, t, 4, decay, documents, keys=d)
    e, k = some_rows(t, 4, d, dtype, 1, 0.5 * small), some_rows(t, count, d, dtype, 2, small)
    v, q, do = some_rows(t, 4, d, dtype, 3), some_rows(t, count, d, dtype, 4), some_rows(t, 4, d, dtype, 5)
    strength = jnp.asarray(np.random.default_rng(6).random((B, t, 4)), jnp.float32) if has_strength else None
    with dispatch.interpreted(how):
        found = jax.jit(functools.partial(tpu_inverse.solve, heads=4))(e, k, v, chunks, strength=strength)
        again = jax.jit(functools.partial(tpu_inverse.solve_transposed, heads=4, scale=0.7))(
            found.inverse, q, k, do, chunks
        )
    expected = exactly(chunk_scan_by_einsum.solve, e, k, v, chunks, heads=4, strength=strength)
    transposed = exactly(chunk_scan_by_einsum.solve_transposed, found.inverse, q, k, do, chunks, heads=4, scale=0.7)
    for one, other in ((found, expected), (again, transposed)):
        assert one.w.dtype == one.u.dtype == jnp.dtype(dtype)
        for name in ("w", "u"):
            assert error(getattr(one, name), getattr(other, name)) < (1e-5 if dtype == "float32" else 0.004), name
    assert error(found.inverse, expected.inverse) < (1e-5 if dtype == "float32" else 0.002)
    if how == "races":
        assert not races_found()


def test_heads_that_do_not_fit_together_are_transposed(monkeypatch):
    """Three heads of 24 and 12 channels fill no whole lanes: all together, or one at a time where that would be too
    much."""
    rows = [
        some_rows(32, count, d, "float32", i)
        for i, (count, d) in enumerate(zip((3, 1, 3), (KEY, KEY, VALUE), strict=True))
    ]
    chunks, settings = some_chunks(16, 32, 3, "key", True), scan_settings(3, 32, "float32", reverse=True)
    together, expected = result("values", rows, chunks, **settings)
    monkeypatch.setattr(tpu_blocks, "BLOCK_BYTES", 0)
    one_by_one, _ = result("values", rows, chunks, **settings)
    compare(one_by_one, expected, {}, 1e-5)
    compare(one_by_one, together, {}, 1e-6)


@pytest.mark.parametrize("key_heads", [8, 4])
def test_several_groups_of_heads(monkeypatch, key_heads):
    """Two programs of four heads of 64 channels; the heads lie side by side in pairs, or two read one head of keys."""
    monkeypatch.setattr(tpu_blocks, "ENOUGH_LANES", 512)
    b, t, c, h, d = 1, 16, 8, 8, 64
    rng = np.random.default_rng(1)
    rows = [jnp.asarray(rng.normal(size=(b, t, count, d)), jnp.float32) for count in (8, key_heads, 8)]
    assert (
        tpu_blocks.plan_heads({"q": rows[0], "k": rows[1], "v": rows[2]}, {"o": (d, jnp.float32)}, h, d, d, c).group
        == 4
    )
    total = jnp.cumsum(-jnp.abs(jnp.asarray(rng.normal(size=(b, h, t // c, c)), jnp.float32)), axis=3).reshape(b, h, t)
    state = jnp.asarray(rng.normal(size=(b, h, d, d)), jnp.float32)
    found, expected = result("values", rows, Chunks(c, "head", total), heads=h, initial_state=state, dot_with=rows[2])
    compare(found, expected, {}, 1e-5)


def test_odd_head_sizes():
    rng = np.random.default_rng(2)
    rows = [jnp.asarray(rng.normal(size=(1, 16, 3, d)), jnp.bfloat16) for d in (5, 5, 7)]
    found, expected = result("values", rows, Chunks(8), heads=3, reverse=True, dot_with=rows[2])
    compare(found, expected, {}, CLOSE["bfloat16"])


def test_the_same_bits_twice():
    rows = [some_rows(32, 2, d, "bfloat16", i) for i, d in enumerate((KEY, KEY, VALUE))]
    chunks, settings = some_chunks(16, 32, 2, "key", True), scan_settings(2, 32, "bfloat16")
    with dispatch.interpreted():
        run = jax.jit(functools.partial(tpu.scan, **settings))
        one, other = run(*rows, chunks), run(*rows, chunks)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize(
    ("heads", "counts", "key_dim", "value_dim", "group", "together"),
    [
        (16, (16, 16, 16), 64, 64, 8, 2),  # two fill 128 lanes, eight are enough work
        (16, (16, 16, 16), 128, 128, 4, 1),
        (16, (16, 16, 16), 256, 256, 2, 1),
        (16, (16, 16, 16), 32, 32, 16, 4),
        (16, (16, 16, 16), 32, 64, 16, 2),
        (16, (1, 1, 16), 64, 64, 8, 1),  # one head of keys is all there is
        (16, (2, 2, 16), 64, 64, 16, 1),  # two are, so all sixteen of v are held
        (16, (2, 2, 16), 128, 128, 4, 1),
        (3, (3, 3, 3), 60, 40, 3, 1),  # 60 is no multiple of the 8 rows a register has
        (1, (1, 1, 1), 64, 64, 1, 1),
    ],
)
def test_how_many_heads_a_program_holds(heads, counts, key_dim, value_dim, group, together):
    rows = {
        name: jax.ShapeDtypeStruct((1, 2048, count, d), jnp.bfloat16)
        for name, count, d in zip("qkv", counts, (key_dim, key_dim, value_dim), strict=True)
    }
    plan = tpu_blocks.plan_heads(rows, {"o": (value_dim, jnp.bfloat16)}, heads, key_dim, value_dim, 128)
    assert plan == tpu_blocks.HeadGroups(heads, group, True)
    assert tpu_blocks.side_by_side(group, [plan.held(count) for count in counts], key_dim, value_dim) == together


def test_what_is_refused():
    assert (
        tpu.refuses(64, 256, jnp.bfloat16, "key", True) is None
        and tpu.refuses(5, 7, jnp.float32, "none", False) is None
    )
    assert "float16" in tpu.refuses(64, 64, jnp.float16, "none", False)
    assert "256" in tpu.refuses(64, 320, jnp.bfloat16, "none", False)
    rows = [some_rows(24, 2, d, "float32", i) for i, d in enumerate((KEY, KEY, VALUE))]
    with pytest.raises(ValueError, match="chunks of a multiple of 8"):
        tpu.scan(*rows, Chunks(12), heads=2)
    with pytest.raises(ValueError, match="power of two"):
        tpu.scan(*rows, Chunks(24, "key", jnp.zeros((B, 24, 2, KEY))), heads=2)
    with pytest.raises(ValueError, match="q must be"):
        tpu.scan(rows[0][:, :16], *rows[1:], Chunks(8), heads=2)
    with pytest.raises(ValueError, match="not served"):
        tpu.delta_scan(rows[0], rows[2], rows[1], Chunks(8, "value", jnp.zeros((B, 24, 2, VALUE))), heads=2)


def test_chunks_are_of_sizes_that_are_served():
    for decay in ("none", "head", "key", "value"):
        for erase in (False, True):
            size = tpu.chunk_size(decay, erase, 64, 64, jnp.bfloat16)
            assert size % tpu_blocks.SUBLANES == 0 and size & (size - 1) == 0
