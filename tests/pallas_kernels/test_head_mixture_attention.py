"""Head-mixture attention: the head_tiles of gathered queries, and the xla forms against the specification in fp64."""

from __future__ import annotations

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.head_mixture_attention import head_mixture_attention, xla
from recollect.pallas_kernels.head_mixture_attention.head_groups import ends, group_by_head, tile_count

CLOSE = 1e-5


def error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    size = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((found - expected) ** 2)) / size) if size else float(np.max(np.abs(found), initial=0))


def routing(b, t, h, active, seed=0, crowd=None) -> jax.Array:
    """(b, t, h) bool, exactly `active` per token; `crowd`: a head that every token chooses."""
    scores = np.random.default_rng(seed).random((b, t, h))
    if crowd is not None:
        scores[..., crowd] = 2
    return jnp.asarray(np.argsort(np.argsort(-scores, axis=-1), axis=-1) < active)


def documents(b: int, t: int) -> tuple[jax.Array, jax.Array]:
    """Segments with padding at the start, between, inside and at the end, and positions within documents."""
    rng = np.random.default_rng(t)
    segments = np.sort(rng.integers(1, 4, (b, t)), axis=1)
    segments[rng.random((b, t)) < 0.15] = 0
    segments[0, : t // 20] = 0
    segments[-1, t - t // 12 :] = 0
    positions = np.zeros((b, t), np.int32)
    for row in range(b):
        for segment in set(segments[row]) - {0}:
            own = segments[row] == segment
            positions[row, own] = np.arange(own.sum())
    return jnp.asarray(segments, jnp.int32), jnp.asarray(positions)


def arguments(t, *, b=2, h=6, g=6, active=3, k=8, v=12, crowd=None, segmented=False, dtype=jnp.float32):
    """Differentiable inputs by name, and the others."""
    keys = jax.random.split(jax.random.key(t), 4)
    inputs = {
        "q": jax.random.normal(keys[0], (b, t, h, k), dtype),
        "k": jax.random.normal(keys[1], (b, t, g, k), dtype),
        "v": jax.random.normal(keys[2], (b, t, g, v), dtype),
        "gates": jax.random.uniform(keys[3], (b, t, h), jnp.float32, 0.5, 1.5),
    }
    fixed = {"chosen": routing(b, t, h, active, crowd=crowd)}
    if segmented:
        fixed["query_segments"], fixed["query_positions"] = documents(b, t)
    if h % g:
        fixed["key_heads"] = tuple((head + 1) * g // (h + 1) for head in range(h))
    return inputs, fixed


def results(form, inputs, fixed):
    """Output, log-sum-exp, and gradients by name of a sum that weighs both unevenly."""

    def run(inputs):
        out, lse = form(**inputs, **fixed, return_lse=True)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weights) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * weights[..., 0]), (out, lse)

    gradients, outputs = jax.jit(jax.grad(run, has_aux=True))(inputs)
    return outputs, gradients


def exactly(inputs, fixed, **more):
    """By the specification in fp64."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in inputs.items()}
        return jax.tree.map(
            np.asarray, results(functools.partial(head_mixture_attention, backend="reference", **more), wide, fixed)
        )


def compare(found, expected, close=CLOSE):
    (out, lse), gradients = found
    (out_, lse_), gradients_ = expected
    assert np.array_equal(np.isfinite(lse), np.isfinite(lse_))
    assert error(out, out_) < close
    assert error(np.where(np.isfinite(lse), lse, 0), np.where(np.isfinite(lse_), lse_, 0)) < close
    for name in gradients_:
        assert error(gradients[name], gradients_[name]) < close, name


@contextlib.contextmanager
def taking(form: str, tile: int | None = None):
    """Inside, the xla form goes this way, whatever would pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "strategy", lambda *sizes, **more: form)
        if tile is not None:
            patch.setattr(xla, "tile_of", lambda *sizes: tile)
        yield


def planned(chosen, active, tile):
    return jax.tree.map(np.asarray, jax.jit(group_by_head, static_argnums=(1, 2))(chosen, active, tile))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_a_plan_holds_every_choice_once(data):
    b, t, h, tile = (
        2,
        data.draw(st.sampled_from([1, 2, 13, 40])),
        data.draw(st.integers(1, 5)),
        data.draw(st.sampled_from([1, 4, 16])),
    )
    active = data.draw(st.integers(1, h))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    # Favourites make crowds; fewer than `active` choices are allowed.
    scores = rng.random((b, t, h)) + data.draw(st.sampled_from([0.0, 0.3, 1.0])) * np.arange(h)
    chosen = np.argsort(np.argsort(-scores, axis=-1), axis=-1) < active
    if data.draw(st.booleans()):
        chosen &= rng.random((b, t, 1)) < 0.7
    head_tiles = planned(jnp.asarray(chosen), active, tile)
    n = head_tiles.tokens.shape[1]
    assert n == tile_count(t, h, active, tile) and n * tile <= t * active + h * tile
    bounds = ends(t, h, active, tile)
    assert len(bounds) == n and list(bounds) == sorted(bounds, reverse=True)
    for row in range(b):
        pairs = []
        for index, (tokens, head) in enumerate(zip(head_tiles.tokens[row], head_tiles.heads[row], strict=True)):
            real = tokens < t
            assert 0 <= head < h and np.all(tokens[~real] == t)
            assert np.all(np.diff(tokens[real]) > 0) and np.all(np.diff(real.astype(int)) >= 0), (
                "filler first, then by position"
            )
            pairs += [(head, token, index * tile + place) for place, token in enumerate(tokens) if token < t]
        assert [pair[:2] for pair in pairs] == [
            (head, token) for head in range(h) for token in range(t) if chosen[row, token, head]
        ]
        rows = np.full((t, h), n * tile)
        for head, token, place in pairs:
            rows[token, head] = place
        assert np.array_equal(head_tiles.rows[row], rows)
        last = sorted((max(tokens[tokens < t], default=-1) + 1 for tokens in head_tiles.tokens[row]), reverse=True)
        assert all(seen <= bound for seen, bound in zip(last, bounds, strict=True))


@pytest.mark.parametrize("sort", [False, True])
def test_rows_go_out_and_come_back(sort):
    chosen = routing(2, 37, 5, 2)
    x = jax.random.normal(jax.random.key(0), (2, 37, 5, 3))

    @jax.jit
    def run(x):
        head_tiles = group_by_head(chosen, 2, 8)
        head_tiles = head_tiles.latest_first() if sort else head_tiles
        rows = head_tiles.gather(x)
        there = jax.grad(lambda x: jnp.sum(jnp.sin(head_tiles.gather(x))))(x)
        back = jax.grad(lambda rows: jnp.sum(head_tiles.combine(rows) * x))(rows)
        return (
            head_tiles,
            rows,
            head_tiles.combine(rows),
            there,
            back,
            head_tiles.field(jnp.arange(74).reshape(2, 37), -1),
        )

    head_tiles, rows, combined, there, back, field = jax.tree.map(np.asarray, run(x))
    assert np.array_equal(combined, np.where(chosen[..., None], x, 0))
    filler = head_tiles.tokens == 37
    assert filler.any() and not np.any(rows[filler.reshape(2, -1)])
    assert error(there, np.where(np.asarray(chosen)[..., None], jnp.cos(x), 0)) < 1e-6
    assert np.array_equal(back, rows)
    assert np.array_equal(field, np.where(filler, -1, head_tiles.tokens + np.array([0, 37])[:, None, None]))


def test_an_even_routing_is_bounded_closely():
    """Four heads of which each token takes one, 1,024 tokens: tiles see little more than half of the square, a
    head's first tiles least."""
    t, tile = 1024, 64
    work = sum((last - first) * tile * seen for first, last, seen in xla.groups(t, 4, 1, tile))
    assert 0.5 * t * t < work < 0.85 * t * t


FORMS = [
    # t, sizes, form, tile
    (1, {"active": 1}, "pairs", None),
    (63, {"h": 5, "g": 3, "segmented": True}, "rows", 16),
    *(
        pytest.param(case, marks=pytest.mark.wide)
        for case in [
            (1, {"active": 4, "segmented": True}, "rows", 4),
            (63, {}, "rows", 16),
            (63, {"active": 1, "segmented": True}, "rows", 8),
            (63, {"crowd": 2}, "rows", 16),
            (63, {"h": 4, "g": 2, "active": 4}, "rows", 16),
            (63, {"h": 5, "g": 3}, "dense", None),
            (63, {"h": 4, "g": 2, "segmented": True}, "dense", None),
        ]
    ),
    (257, {"segmented": True, "crowd": 0, "active": 2, "h": 4, "g": 2}, "rows", 32),
    pytest.param((1000, {"b": 1}, "rows", None), marks=pytest.mark.wide),
    pytest.param((1000, {"segmented": True, "b": 1}, "rows", 64), marks=pytest.mark.wide),
]


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_forms_are_the_specification(case):
    t, sizes, form, tile = case
    inputs, fixed = arguments(t, **sizes)
    active = sizes.get("active", 3)
    with taking(form, tile):
        found = results(
            functools.partial(head_mixture_attention, active=active, scale=0.3, backend="xla"), inputs, fixed
        )
    compare(found, exactly(inputs, fixed, active=active, scale=0.3))


@pytest.mark.parametrize(("t", "form"), [(1, "pairs"), pytest.param(2, "pairs", marks=pytest.mark.wide), (9, "rows")])
def test_new_queries_on_a_cache(t, form):
    """Slots in any order, some free; queries that continue a document."""
    inputs, fixed = arguments(40, segmented=True, active=2)
    shuffle = np.random.default_rng(0).permutation(40)
    chosen = routing(2, t, 6, 2)
    segments, positions = fixed["query_segments"], fixed["query_positions"]
    inputs |= {name: inputs[name][:, :t] for name in ("q", "gates")} | {
        name: inputs[name][:, shuffle] for name in ("k", "v")
    }
    fixed = {
        "chosen": chosen,
        "query_positions": positions[:, 20 : 20 + t],
        "query_segments": segments[:, 20 : 20 + t],
        "key_positions": positions[:, shuffle],
        "key_segments": segments[:, shuffle],
    }
    with taking(form, 4):
        found = results(functools.partial(head_mixture_attention, active=2, backend="xla"), inputs, fixed)
    compare(found, exactly(inputs, fixed, active=2))


@pytest.mark.parametrize(
    "form", ["rows", *(pytest.param(form, marks=pytest.mark.wide) for form in ("dense", "reference"))]
)
def test_padding_full_of_nan_touches_nothing(form):
    inputs, fixed = arguments(50, segmented=True)
    real = fixed["query_segments"] != 0
    clean = {name: jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0.0) for name, x in inputs.items()}
    dirty = {name: jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, jnp.nan) for name, x in inputs.items()}
    run = functools.partial(head_mixture_attention, active=3, backend="reference" if form == "reference" else "xla")
    with taking(form, 16):
        expected, found = results(run, clean, fixed), results(run, dirty, fixed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.all(np.asarray(found[0][0])[~np.asarray(real)] == 0)


def test_the_same_bits_twice():
    inputs, fixed = arguments(90)
    with taking("rows", 16):
        first, second = (
            results(functools.partial(head_mixture_attention, active=3, backend="xla"), inputs, fixed) for _ in range(2)
        )
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_half_precision_stays_near():
    inputs, fixed = arguments(90, dtype=jnp.bfloat16)
    with taking("rows", 16):
        (out, _), gradients = results(functools.partial(head_mixture_attention, active=3, backend="xla"), inputs, fixed)
    with taking("dense"):
        (plain, _), plain_gradients = results(
            functools.partial(head_mixture_attention, active=3, backend="xla"), inputs, fixed
        )
    (out_, _), gradients_ = exactly(inputs, fixed, active=3)
    assert out.dtype == jnp.bfloat16
    assert error(out, out_) < min(0.005, max(0.003, 2 * error(plain, out_)))
    for name in gradients_:
        assert gradients[name].dtype == inputs[name].dtype
        assert error(gradients[name], gradients_[name]) < min(
            0.01, max(0.005, 2 * error(plain_gradients[name], gradients_[name]))
        ), name


@pytest.mark.wide
def test_members_of_a_population_are_batched():
    """Under vmap, gradients included, as when each runs alone."""
    inputs, fixed = arguments(30, b=3)

    def run(inputs, chosen):
        out = head_mixture_attention(**inputs, chosen=chosen, active=3, backend="xla")
        return jnp.sum(jnp.sin(out))

    members = {name: x[:, None] for name, x in inputs.items()}
    with taking("rows", 8):
        together = jax.jit(jax.vmap(jax.grad(run)))(members, fixed["chosen"][:, None])
        alone = jax.jit(jax.grad(run))(inputs, fixed["chosen"])
    for name, gradient in alone.items():
        assert error(together[name][:, 0], gradient) < 1e-6


def test_the_form_is_what_computes_least():
    def form(*sizes):
        return xla.strategy(*sizes, self_attention=True)

    assert {form(1024, 1024, 6, active) for active in range(1, 6)} == {form(4096, 4096, 8, 4)} == {"rows"}
    assert form(1024, 1024, 6, 6) == form(64, 64, 6, 3) == "dense"
    assert xla.strategy(1, 512, 6, 3, self_attention=False) == "pairs"
    assert xla.strategy(256, 512, 6, 3, self_attention=False) == "rows"
    assert xla.strategy(2, 512, 6, 3, self_attention=False) == "dense"


def test_work_falls_with_the_share_of_active_heads():
    def flops(active):
        inputs, fixed = jax.eval_shape(lambda: arguments_for_counting(active))
        run = jax.jit(lambda inputs, fixed: head_mixture_attention(**inputs, **fixed, active=active, backend="xla"))
        return run.lower(inputs, fixed).cost_analysis()["flops"]

    every = flops(8)
    assert flops(4) < 0.7 * every and flops(2) < 0.45 * every and flops(1) < 0.3 * every


def arguments_for_counting(active):
    x = jnp.zeros((1, 2048, 8, 32))
    return {"q": x, "k": x, "v": x}, {"chosen": jnp.zeros((1, 2048, 8), bool)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((4, 3, 8))}, "q must have four"),
        ({"k": jnp.zeros((2, 6, 2, 7))}, "k must be"),
        ({"v": jnp.zeros((2, 6, 4, 5))}, "v must be"),
        ({"k": jnp.zeros((2, 6, 3, 8)), "v": jnp.zeros((2, 6, 3, 5))}, "no multiple"),
        ({"key_heads": (0, 1, 2, 0)}, "key_heads must be 4 numbers from 0 to 1"),
        ({"key_heads": (0, 1)}, "key_heads must be 4"),
        ({"chosen": jnp.zeros((2, 6, 4))}, "chosen must be bool"),
        ({"chosen": jnp.zeros((2, 6, 3), bool)}, "chosen must be bool"),
        ({"active": 0}, "active must be at least 1"),
        ({"gates": jnp.zeros((2, 6, 3))}, "gates must be"),
        ({"query_positions": jnp.zeros((6,), jnp.int32)}, "query_positions must be"),
        (
            {
                "key_segments": jnp.zeros((2, 6), jnp.int32),
                "q": jnp.zeros((2, 4, 4, 8)),
                "chosen": jnp.zeros((2, 4, 4), bool),
            },
            "given together",
        ),
        ({"q": jnp.zeros((2, 4, 4, 8)), "chosen": jnp.zeros((2, 4, 4), bool)}, "need query_positions"),
        ({"backend": "fast"}, "'fast' is unknown"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    arguments = {"q": jnp.zeros((2, 6, 4, 8)), "k": jnp.zeros((2, 6, 2, 8)), "v": jnp.zeros((2, 6, 2, 5))}
    arguments |= {"chosen": jnp.zeros((2, 6, 4), bool), "active": 2, **changes}
    with pytest.raises(ValueError, match=f"head_mixture_attention: .*{message}"):
        inspect.unwrap(head_mixture_attention)(**arguments)


def test_the_choice_is_recorded():
    inputs, fixed = arguments(20)
    with dispatch.recorded_choices() as choices:
        jax.eval_shape(lambda: head_mixture_attention(**inputs, **fixed, active=3))
    assert choices[0].operation == "head_mixture_attention" and choices[0].backend == "xla"


def test_what_is_not_chosen_is_zero():
    inputs, fixed = arguments(20)
    run = jax.jit(functools.partial(head_mixture_attention, active=3, return_lse=True, backend="reference"))
    out, lse = run(**inputs, **fixed)
    assert np.array_equal(np.any(np.asarray(out) != 0, axis=-1), fixed["chosen"]) and np.array_equal(
        np.isfinite(lse), fixed["chosen"]
    )
