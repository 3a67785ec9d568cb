"""The mask algebra against loops over pairs of tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels.masks import (
    LANDMARK,
    Causal,
    EarlierBlock,
    Everything,
    IsLandmark,
    IsOrdinary,
    KeyIs,
    Not,
    OfHeads,
    QueryIs,
    Same,
    SameBlock,
    SameSegment,
    Sinks,
    TokenFields,
    Window,
    band,
)
from recollect.pallas_kernels.softmax_attention import softmax_attention

BLOCK = 3


def tokens(b: int, t: int, seed: int) -> TokenFields:
    """Documents whose tokens stand in any order, with padding among them."""
    rng = np.random.default_rng(seed)
    positions, segments = rng.integers(0, 12, (b, t)), rng.integers(0, 3, (b, t))
    types = np.where(positions % (BLOCK + 1) == BLOCK, LANDMARK, 0)
    return TokenFields(*(jnp.asarray(x, jnp.int32) for x in (positions, segments, types, positions // (BLOCK + 1))))


QUERY, KEY = tokens(2, 9, 0), tokens(2, 14, 1)
LEAVES = {
    Everything(): lambda q, k: True,
    Causal(): lambda q, k: k["positions"] <= q["positions"],
    Window(4): lambda q, k: q["positions"] - k["positions"] < 4,
    Sinks(2): lambda q, k: k["positions"] < 2,
    SameSegment(): lambda q, k: q["segments"] == k["segments"],
    SameBlock(): lambda q, k: q["blocks"] == k["blocks"],
    EarlierBlock(): lambda q, k: k["blocks"] < q["blocks"],
    IsLandmark(): lambda q, k: k["token_types"] == LANDMARK,
    IsOrdinary(): lambda q, k: k["token_types"] != LANDMARK,
    Causal("blocks"): lambda q, k: k["blocks"] <= q["blocks"],
    band(3): lambda q, k: abs(q["positions"] - k["positions"]) < 3,
    Same("token_types"): lambda q, k: q["token_types"] == k["token_types"],
    QueryIs("blocks", (0, 2)): lambda q, k: q["blocks"] in (0, 2),
    KeyIs("positions", (1, 5, 6)): lambda q, k: k["positions"] in (1, 5, 6),
}


def by_loops(rule, query: TokenFields = QUERY, key: TokenFields = KEY) -> np.ndarray:
    def at(fields, row, i):
        return {name: int(getattr(fields, name)[row, i]) for name in ("positions", "segments", "token_types", "blocks")}

    shape = (*query.positions.shape, key.positions.shape[1])
    found = np.zeros(shape, bool)
    for row, i, j in itertools.product(*map(range, shape)):
        q, k = at(query, row, i), at(key, row, j)
        found[row, i, j] = bool(rule(q, k)) and q["segments"] != 0 and k["segments"] != 0
    return found


@pytest.mark.parametrize("mask", LEAVES, ids=str)
def test_every_leaf(mask):
    found = mask.dense(QUERY, KEY)
    assert found.dtype == bool
    expected = by_loops(LEAVES[mask])
    np.testing.assert_array_equal(found, expected)
    assert expected.any()  # no case is empty


def test_expressions():
    window = Causal() & Window(4) & SameSegment()
    np.testing.assert_array_equal(
        window.dense(QUERY, KEY),
        by_loops(lambda q, k: 0 <= q["positions"] - k["positions"] < 4 and q["segments"] == k["segments"]),
    )
    sinks = Causal() & SameSegment() & (Window(2) | Sinks(1))
    np.testing.assert_array_equal(
        sinks.dense(QUERY, KEY),
        by_loops(
            lambda q, k: (
                q["segments"] == k["segments"]
                and k["positions"] <= q["positions"]
                and (q["positions"] - k["positions"] < 2 or k["positions"] == 0)
            )
        ),
    )
    main = Causal() & ((SameBlock() & ~IsLandmark()) | (EarlierBlock() & IsLandmark()))
    np.testing.assert_array_equal(
        main.dense(QUERY, KEY),
        by_loops(
            lambda q, k: (
                k["positions"] <= q["positions"]
                and (k["token_types"] != LANDMARK if k["blocks"] == q["blocks"] else k["token_types"] == LANDMARK)
            )
        ),
    )


def test_the_algebras_laws():
    a, b = Causal(), Window(3)
    for left, right in (
        (~(a & b), ~a | ~b),
        (~(a | b), ~a & ~b),
        (~~a, a),
        (a & Everything(), a),
        (a | ~a, Everything()),
    ):
        np.testing.assert_array_equal(left.dense(QUERY, KEY), right.dense(QUERY, KEY))


@pytest.mark.parametrize(
    "mask", [Everything(), ~Causal(), ~SameSegment(), SameSegment(), ~(Causal() & Sinks(1))], ids=str
)
def test_padding_neither_sees_nor_is_seen(mask):
    found = np.asarray(mask.dense(QUERY, KEY))
    assert not found[np.asarray(QUERY.segments) == 0].any()
    assert not np.moveaxis(found, 2, 1)[np.asarray(KEY.segments) == 0].any()
    assert found.any()


def test_block_masks_need_their_fields():
    bare = TokenFields(QUERY.positions, QUERY.segments)
    for mask, field in ((SameBlock(), "blocks"), (EarlierBlock(), "blocks"), (IsLandmark(), "token_types")):
        with pytest.raises(AssertionError, match=field):
            mask.dense(bare, bare)


def test_rewriting_takes_out_what_allows_everything_or_nothing():
    heads = OfHeads((0, 2))
    mask = (Causal() | (heads & SameSegment())) & Window(3)
    assert mask.differs_by_head and mask.of_head(1) == Causal() & Window(3)
    assert mask.of_head(2) == (Causal() | SameSegment()) & Window(3)
    assert (~heads & Causal()).of_head(0) == Not(Everything()) and (~heads | Causal()).of_head(1) == Everything()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_heads_with_masks_of_their_own_are_those_heads_computed_alone(key_heads):
    """Of shared key heads, too; with sinks, a bias of some heads, gradients and log-sum-exps."""
    heads = OfHeads((0, 1, 3))
    mask = (heads & Causal()) | (~heads & band(3) & Same("blocks"))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, h, 4)), jnp.float32) for h in (4, key_heads, key_heads))
    fields = {"query_positions": QUERY.positions, "query_segments": QUERY.segments}
    fields["query_fields"] = {"blocks": QUERY.blocks}
    sinks, bias = jnp.asarray(rng.normal(size=4), jnp.float32), jnp.asarray(rng.normal(size=(1, 4, 9, 9)), jnp.float32)

    def run(q, k, v):
        out, lse = softmax_attention(q, k, v, mask=mask, sinks=sinks, bias=bias, return_lse=True, **fields)
        return jnp.sum(jnp.sin(out)), (out, lse)

    def alone(q, k, v):
        outs = []
        for head, of_keys in enumerate(np.repeat(np.arange(key_heads), 4 // key_heads)):
            part = slice(head, head + 1)
            dense = mask.of_head(head).dense(QUERY, QUERY)
            keys = (x[:, :, of_keys : of_keys + 1] for x in (k, v))
            call = {"mask": dense, "sinks": sinks[part], "bias": bias[:, part], "return_lse": True}
            segments = {"query_segments": QUERY.segments, "backend": "reference"}
            outs.append(softmax_attention(q[:, :, part], *keys, **call, **segments))
        out, lse = (jnp.concatenate(side, axis=2) for side in zip(*outs, strict=True))
        return jnp.sum(jnp.sin(out)), (out, lse)

    found, expected = (
        jax.tree.leaves(jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)) for f in (run, alone)
    )
    for actual, one in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, one, rtol=1e-5, atol=1e-5)
