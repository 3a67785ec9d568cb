"""Block schedules of random mask expressions over random fields: no tile that holds an allowed pair is called empty,
none that holds a forbidden one full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.layers.packing import document_positions
from recollect.pallas_kernels.masks import (
    LANDMARK,
    Causal,
    EarlierBlock,
    Everything,
    IsLandmark,
    IsOrdinary,
    KeyIs,
    Mask,
    QueryIs,
    SameBlock,
    SameSegment,
    Sinks,
    StoredNear,
    TokenFields,
    Window,
    band,
    causal,
)
from recollect.pallas_kernels.scheduled_attention import flash_vjp
from recollect.pallas_kernels.scheduled_attention.block_schedule import (
    EMPTY,
    FULL,
    PARTIAL,
    Tokens,
    block_schedule,
    needed,
)
from recollect.pallas_kernels.softmax_attention import merge, softmax_attention
from tests.pallas_kernels import tiles_by_einsum

LEAVES = [Everything(), Causal(), SameSegment(), SameBlock(), EarlierBlock(), IsLandmark(), IsOrdinary()]
LEAVES += [Causal("blocks"), QueryIs("blocks", (0, 2)), KeyIs("positions", (1, 2, 5)), band(4)]
leaves = st.one_of(st.sampled_from(LEAVES), st.builds(Window, st.integers(1, 20)), st.builds(Sinks, st.integers(1, 9)))
masks = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=5,
)


def fields(seed: int, b: int, t: int, orderly: bool, block: int = 3) -> TokenFields:
    """Documents in a row with padding among them; or tokens with fields of any value, as a cache that was evicted
    from may have them."""
    rng = np.random.default_rng(seed)
    if orderly:
        segments = np.sort(rng.integers(0, 4, (b, t)), axis=1).astype(np.int32)
        segments[rng.random((b, t)) < 0.1] = 0
        positions = np.asarray(document_positions(jnp.asarray(segments)))
    else:
        segments, positions = rng.integers(0, 3, (b, t)).astype(np.int32), rng.integers(0, 30, (b, t)).astype(np.int32)
    types = np.where(positions % (block + 1) == block, LANDMARK, 0).astype(np.int32)
    return TokenFields(positions, segments, types, positions // (block + 1))


def tiles(dense: np.ndarray, query_tile: int, key_tile: int) -> np.ndarray:
    """(b, nq, nk, pairs)"""
    b, t, s = dense.shape
    x = dense.reshape(b, t // query_tile, query_tile, s // key_tile, key_tile)
    return np.moveaxis(x, 2, 3).reshape(b, t // query_tile, s // key_tile, -1)


def assert_right(kinds, dense, query_tile: int, key_tile: int) -> None:
    truth = tiles(dense, query_tile, key_tile)
    kinds = np.broadcast_to(np.asarray(kinds), truth.shape[:3])
    assert not truth[kinds == EMPTY].any()
    assert truth[kinds == FULL].all()


@settings(max_examples=100, deadline=None)
@given(masks, st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([(4, 8), (8, 4), (16, 16), (1, 2)]))
def test_no_tile_is_called_empty_or_full_wrongly(mask: Mask, seed, orderly, queries_orderly, sizes):
    query, key = fields(seed, 2, 32, queries_orderly), fields(seed + 1, 2, 48, orderly)
    dense = np.asarray(mask.dense(query, key))
    schedule = block_schedule(mask, query.present(), key.present(), (32, 48), sizes)
    assert isinstance(schedule.kinds, np.ndarray)
    assert_right(schedule.kinds, dense, *sizes)
    # Segments alone unknown, and everything unknown, at trace time: the same on the device, and never fewer tiles than
    # there can be.
    for unknown in (("segments",), tuple(query.present())):
        sides = [
            {name: jnp.asarray(x) if name in unknown else x for name, x in side.present().items()}
            for side in (query, key)
        ]
        traced = block_schedule(mask, *sides, (32, 48), sizes)
        np.testing.assert_array_equal(np.broadcast_to(np.asarray(traced.kinds), schedule.kinds.shape), schedule.kinds)
        assert traced.most[(schedule.kinds != EMPTY).any(axis=0)].all()


OPERATIONS = [
    causal(5),
    causal(segmented=True),
    causal(6, segmented=True, ordered=True),
    causal(segmented=True) & SameBlock() & IsOrdinary(),
    causal(segmented=True, ordered=True) & SameBlock() & IsOrdinary(),
    EarlierBlock() & SameSegment(),
    EarlierBlock() & SameSegment() & StoredNear(),
]


@pytest.mark.parametrize("mask", OPERATIONS, ids=str)
def test_the_masks_of_operations_are_right_too(mask):
    """With fields known and unknown; `ordered` promises that what is stored after a query is hidden from it."""
    for seed in range(10):
        tokens = fields(seed, 2, 48, True).present()
        tokens["order"] = np.arange(48, dtype=np.int32)[None]
        real = tokens["segments"] != 0
        rows, columns = (
            {name: x[..., None] if side else x[:, None, :] for name, x in tokens.items()} for side in (1, 0)
        )
        dense = mask.allows(Tokens(**rows), Tokens(**columns)) & real[:, :, None] & real[:, None, :]
        given_tokens = {name: tokens[name] for name in (*mask.fields, "segments")}
        schedule = block_schedule(mask, given_tokens, given_tokens, (48, 48), (8, 4))
        assert_right(schedule.kinds, dense, 8, 4)
        unknown = {name: x if name == "order" else jnp.asarray(x) for name, x in given_tokens.items()}
        traced = block_schedule(mask, unknown, unknown, (48, 48), (8, 4))
        np.testing.assert_array_equal(np.asarray(traced.kinds), np.broadcast_to(schedule.kinds, traced.kinds.shape))
        assert traced.most[(schedule.kinds != EMPTY).any(axis=0)].all()


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(0, 10**6), st.booleans())
def test_visits_are_the_tiles_that_are_not_empty_in_order(mask: Mask, seed, traced):
    query, key = (side.present() for side in (fields(seed, 2, 32, True), fields(seed + 1, 2, 48, True)))
    if traced:
        query, key = ({name: jnp.asarray(x) for name, x in side.items()} for side in (query, key))
    schedule = block_schedule(mask, query, key, (32, 48), (8, 8))
    heads = jnp.asarray(np.random.default_rng(seed).integers(0, 2, (2, 4)), jnp.int32)
    kinds = np.broadcast_to(np.asarray(schedule.kinds), (2, 4, 6))
    own = (np.asarray(heads)[:, None, None, :] == np.arange(2)[:, None, None]) & True
    expected = {
        "visits": (schedule.visits(), kinds[:, None]),
        "transposed": (schedule.transposed(), kinds.swapaxes(1, 2)[:, None]),
        "of key heads": (schedule.transposed(heads, 2), np.where(own, kinds.swapaxes(1, 2)[:, None], EMPTY)),
    }
    for name, (visits, truth) in expected.items():
        count, index, partial = (np.asarray(x) for x in (visits.count, visits.index, visits.partial))
        shape = (2, truth.shape[1])
        for place in np.ndindex(*shape, truth.shape[2]):
            at = tuple(i if n > 1 else 0 for i, n in zip(place, (*count.shape[:2], truth.shape[2]), strict=True))
            wanted = np.flatnonzero(truth[place] != EMPTY)
            n = int(count[at])
            assert n == len(wanted), name
            np.testing.assert_array_equal(index[at][:n], wanted)
            np.testing.assert_array_equal(partial[at][:n], truth[place][wanted] == PARTIAL)
            assert (index[at][n:] == (wanted[-1] if n else 0)).all()
        assert int(visits.longest) == max(1, count.max())


def arrays(t: int, s: int):
    keys = jax.random.split(jax.random.key(t), 3)
    return (
        jax.random.normal(keys[0], (2, t, 4, 8)),
        jax.random.normal(keys[1], (2, s, 2, 8)),
        jax.random.normal(keys[2], (2, s, 2, 6)),
    )


def close(found, expected) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        a, b = (np.where(np.isfinite(x), x, 0) for x in (a, b))
        assert np.sqrt(np.mean((a - b) ** 2)) <= 2e-6 * max(1e-3, np.sqrt(np.mean(b**2)))


EXPRESSIONS = {
    "sinks and window": Causal() & SameSegment() & (Window(9) | Sinks(3)),
    "causal": Causal(),
    "not causal": ~Causal() & SameSegment(),
    "everything": Everything(),
    "landmarks of earlier blocks": SameSegment() & EarlierBlock() & IsLandmark(),
    "own block or future": (SameBlock() & SameSegment()) | ~Window(1),
}


@pytest.mark.parametrize(("name", "orderly"), [(name, i % 2 == 0) for i, name in enumerate(EXPRESSIONS)])
def test_forms_by_rule_equal_the_dense_form(name, orderly):
    """Values, log-sum-exps and gradients; the scheduled kernels' own too, by their specification, which trusts full
    tiles."""
    mask, t, s = EXPRESSIONS[name], 77, 130
    q, k, v = arrays(t, s)
    sinks = jnp.array([0.5, -1.0, 2.0, 0.0])
    query, key = fields(3, 2, t, orderly), fields(4, 2, s, orderly)
    dense = jnp.asarray(mask.dense(query, key))

    def by_array(q, k, v, sinks):
        return softmax_attention(q, k, v, mask=dense, sinks=sinks, return_lse=True, backend="reference")

    def by_rule(q, k, v, sinks, backend):
        sides = {
            f"{side}_{name}": x
            for side, tokens in (("query", query), ("key", key))
            for name, x in (
                ("positions", tokens.positions),
                ("segments", tokens.segments),
                ("fields", {"token_types": tokens.token_types, "blocks": tokens.blocks}),
            )
        }
        out, lse = softmax_attention(q, k, v, mask=mask, sinks=sinks, return_lse=True, backend=backend, **sides)
        return out, lse

    def by_tiles(q, k, v, sinks):
        sides = {f"{side}_fields": needed(mask, tokens.present()) for side, tokens in (("query", query), ("key", key))}
        return flash_vjp.attend(
            tiles_by_einsum, q, k, v, mask=mask, scale=8**-0.5, query_tile=16, key_tile=32, sinks=sinks, **sides
        )

    def both(f):
        def loss(*x):
            out, lse = f(*x)
            return jnp.sum(jnp.sin(out)) + jnp.sum(
                jnp.cos(jnp.where(lse > -jnp.inf, lse, 0)) * (query.segments != 0)[..., None]
            ), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, sinks)

    expected = both(by_array)
    # A padded query sees the sink in none of the forms but the array's, which knows no segments: its log-sum-exp is
    # left out of the loss.
    for form in (lambda *x: by_rule(*x, "xla"), lambda *x: by_rule(*x, "reference"), by_tiles):
        close(both(form), expected)


def test_a_rule_known_at_trace_time_visits_few_tiles_in_xla():
    """One document with first tokens kept: the work grows with the window."""

    def flops(t):
        q, k, v = (jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32),) * 3
        attend = jax.jit(
            lambda q, k, v: softmax_attention(q, k, v, mask=Causal() & (Window(64) | Sinks(4)), backend="xla")
        )
        return attend.lower(q, k, v).compile().cost_analysis()["flops"]

    assert flops(2048) < 2.2 * flops(1024)


def test_merge_is_exact_over_any_partition_of_the_keys():
    q, k, v = arrays(40, 90)
    parts = jax.random.randint(jax.random.key(0), (2, 40, 90), 0, 4)
    sinks = jnp.array([0.5, -1.0, 2.0, 0.0])

    def whole(q, k, v, sinks):
        return softmax_attention(q, k, v, mask=parts < 3, sinks=sinks, return_lse=True)

    def merged(q, k, v, sinks):
        each = [
            softmax_attention(q, k, v, mask=parts == i, sinks=sinks if i == 1 else None, return_lse=True)
            for i in range(3)
        ]
        nothing = softmax_attention(q, k, v, mask=parts > 3, return_lse=True)
        return merge(nothing, *each)

    def both(f):
        return jax.jit(
            jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x)[0])) + jnp.sum(jnp.cos(f(*x)[1])), argnums=(0, 1, 2, 3))
        )(q, k, v, sinks)

    close(jax.jit(merged)(q, k, v, sinks), jax.jit(whole)(q, k, v, sinks))
    close(both(merged), both(whole))
    nothing = softmax_attention(q, k, v, mask=parts > 3, return_lse=True)
    out, lse = merge(nothing, nothing)
    assert not np.asarray(out).any() and np.isneginf(np.asarray(lse)).all()


def test_bad_calls_name_what_is_wrong():
    q, k, v = arrays(20, 30)
    with pytest.raises(ValueError, match="reads segments"):
        softmax_attention(q, k, v, mask=SameSegment())
    with pytest.raises(ValueError, match="reads positions"):
        softmax_attention(q, k, v, mask=Causal())
    with pytest.raises(ValueError, match="window=4"):
        softmax_attention(q, q[:, :, :2], q[:, :, :2], mask=Causal(), window=4)
    with pytest.raises(ValueError, match=r"query_fields\['blocks'\]"):
        softmax_attention(q, k, v, mask=Causal(), query_fields={"blocks": jnp.zeros((2, 21), jnp.int32)})
    with pytest.raises(ValueError, match="reads the field blocks"):
        block_schedule(SameBlock(), {}, {}, (4, 4), (2, 2))
