"""The whole family: every published model's arguments against a recurrence of its own, written in its paper's terms in numpy, and
decays a channel, erasing and grouped heads against the specification, forwards and backwards."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.linear_recurrence import columns, linear_recurrence, linear_recurrence_step, passes, reference, triangles
from pallas_kernels.linear_recurrence.reduced import reduced
from tests.pallas_kernels import walks_by_einsum
from tests.pallas_kernels.test_linear_recurrence import CLOSE, documents, error, exactly, results

B, T, H, K, V = 2, 21, 2, 6, 4


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rows(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    return rng, normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)


def walk_tokens(step, q, v):
    """o_t = S_t^T q_t for a state (k, v) that `step(state, b, t, h)` advances."""
    o = np.zeros((B, T, H, V))
    for b in range(B):
        for h in range(H):
            state = np.zeros((K, V))
            for t in range(T):
                state = step(state, b, t, h)
                o[b, t, h] = q[b, t, h] @ state
    return o


def linear_attention():
    _, q, k, v = rows()
    weights = np.tril(np.ones((T, T)))[None, None] * np.einsum("bihk,bjhk->bhij", q, k)
    return {"q": q, "k": k, "v": v}, np.einsum("bhij,bjhv->bihv", weights, v)


def retnet():
    _, q, k, v = rows()
    gamma = 1 - 2.0 ** (-5 - np.arange(H))
    lag = np.arange(T)[:, None] - np.arange(T)
    retention = np.where(lag >= 0, gamma[:, None, None] ** np.maximum(lag, 0), 0) * np.einsum("bihk,bjhk->bhij", q, k)
    return {"q": q, "k": k, "v": v, "log_decay": np.log(gamma)}, np.einsum("bhij,bjhv->bihv", retention, v)


def lightning():
    _, q, k, v = rows()
    slopes = 2.0 ** (-8 * (np.arange(H) + 1) / H) * (1 - 1 / 3 + 1e-5)
    o = walk_tokens(lambda s, b, t, h: np.exp(-slopes[h]) * s + np.outer(k[b, t, h], v[b, t, h]), q, v)
    return {"q": q, "k": k, "v": v, "log_decay": -slopes}, o


def gla():
    rng, q, k, v = rows()
    alpha = sigmoid(rng.normal(size=(B, T, H, K))) ** (1 / 16)
    o = walk_tokens(lambda s, b, t, h: alpha[b, t, h][:, None] * s + np.outer(k[b, t, h], v[b, t, h]), q, v)
    return {"q": q, "k": k, "v": v, "log_decay": np.log(alpha)}, o


def mamba2():
    rng, _, _, x = rows()
    dt, a = np.log1p(np.exp(rng.normal(size=(B, T, H)) - 3)), rng.uniform(1, 16, H)
    one_b, one_c = rng.normal(size=(B, T, 1, K)), rng.normal(size=(B, T, 1, K))
    step = lambda s, b, t, h: np.exp(-a[h] * dt[b, t, h]) * s + dt[b, t, h] * np.outer(one_b[b, t, 0], x[b, t, h])  # noqa: E731
    o = walk_tokens(step, np.repeat(one_c, H, 2), x)
    return {"q": one_c, "k": one_b, "v": x, "log_decay": -a * dt, "write_strength": dt}, o


def delta(gate: str):
    """DeltaNet and its gated kin: what is stored under k moves towards v by the share beta, after the decay."""
    rng, q, k, v = rows()
    k, beta = unit(k), sigmoid(rng.normal(size=(B, T, H)))
    g = {"none": np.zeros((B, T, H, 1)), "head": -rng.exponential(0.3, (B, T, H, 1)), "channel": -rng.exponential(0.3, (B, T, H, K))}[gate]

    def step(s, b, t, h):
        s = np.exp(g[b, t, h])[:, None] * s
        key = k[b, t, h]
        return s + np.outer(key, beta[b, t, h] * (v[b, t, h] - s.T @ key))

    given = {"q": q, "k": k, "v": v, "erase_read": beta[..., None] * k, "write_strength": beta}
    if gate != "none":
        given["log_decay"] = g[..., 0] if gate == "head" else g
    return given, walk_tokens(step, q, v)


def gated_delta_net_2():
    rng, q, k, v = rows()
    k, b_erase, w_write = unit(k), sigmoid(rng.normal(size=(B, T, H, K))), sigmoid(rng.normal(size=(B, T, H, V)))
    g = -rng.exponential(0.3, (B, T, H, K))

    def step(s, b, t, h):
        s = np.exp(g[b, t, h])[:, None] * s
        return s + np.outer(k[b, t, h], w_write[b, t, h] * v[b, t, h] - s.T @ (b_erase[b, t, h] * k[b, t, h]))

    return {"q": q, "k": k, "v": v, "log_decay": g, "erase_read": b_erase * k, "write_strength": w_write}, walk_tokens(step, q, v)


def rwkv7():
    rng, r, k, v = rows()
    w = np.exp(-np.exp(-0.5) * sigmoid(rng.normal(size=(B, T, H, K))))
    a, kk = sigmoid(rng.normal(size=(B, T, H, K))), unit(rng.normal(size=(B, T, H, K)))

    def step(s, b, t, h):
        transition = np.diag(w[b, t, h]) - np.outer(a[b, t, h] * kk[b, t, h], kk[b, t, h])
        return transition @ s + np.outer(k[b, t, h], v[b, t, h])

    given = {"q": r, "k": k, "v": v, "log_decay": np.log(w), "erase_read": kk, "erase_write": a * kk, "erase_before_decay": True}
    return given, walk_tokens(step, r, v)


def comba():
    """A scalar decay plus low rank, S_t = (exp(g) - beta k p^T) S_{t-1} + beta k v^T, gates strong enough that exp(-g) would overflow."""
    rng, q, k, v = rows()
    k, beta = unit(k), sigmoid(rng.normal(size=(B, T, H)))
    p, g = sigmoid(1.0) * k, -np.where(rng.random((B, T, H)) < 0.2, 800, rng.exponential(0.3, (B, T, H)))
    q = q - 0.02 * p

    def step(s, b, t, h):
        transition = np.exp(g[b, t, h]) * np.eye(K) - beta[b, t, h] * np.outer(k[b, t, h], p[b, t, h])
        return transition @ s + beta[b, t, h] * np.outer(k[b, t, h], v[b, t, h])

    erase = {"erase_read": beta[..., None] * p, "erase_before_decay": True}
    return {"q": q, "k": k, "v": v, "log_decay": g, "write_strength": beta, **erase}, walk_tokens(step, q, v)


PUBLISHED = {
    "linear attention": linear_attention,
    "RetNet": retnet,
    "TransNormerLLM": lightning,
    "GLA": gla,
    "Mamba-2": mamba2,
    "DeltaNet": functools.partial(delta, "none"),
    "Gated DeltaNet": functools.partial(delta, "head"),
    "KDA": functools.partial(delta, "channel"),
    "Gated DeltaNet 2": gated_delta_net_2,
    "RWKV-7": rwkv7,
    "Comba": comba,
}


def two_dtypes(given):
    """The arguments in fp64, under which arrays must be made, and in fp32."""
    cast = lambda dtype: {name: x if isinstance(x, bool) else jnp.asarray(x, dtype) for name, x in given.items()}  # noqa: E731
    return cast(jnp.float64), cast(jnp.float32)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_are_arguments(model):
    given, expected = PUBLISHED[model]()
    with jax.enable_x64(True):
        wide, narrow = two_dtypes(given)
        exact, _ = linear_recurrence(**wide, backend="reference")
        assert error(exact, expected) < 1e-12
    o, _ = linear_recurrence(**narrow, chunk_size=8, backend="xla")
    assert error(o, expected) < CLOSE


def slots(f, q, k, v):
    """Two passes over m slots that are overwritten by the share 1 - exp f, K~ (m, k) and V~ (m, v): o_t = V~_t^T softmax(K~_t q_t)."""
    o = np.zeros(v.shape)
    for b in range(B):
        for h in range(H):
            keys, values = np.zeros((f.shape[3], K)), np.zeros((f.shape[3], V))
            for t in range(T):
                alpha = np.exp(f[b, t, h])[:, None]
                keys = alpha * keys + (1 - alpha) * k[b, t, h]
                values = alpha * values + (1 - alpha) * v[b, t, h]
                weights = np.exp(keys @ q[b, t, h])
                o[b, t, h] = values.T @ (weights / weights.sum())
    return o


def gsa(m=5):
    rng, q, k, v = rows()
    return np.log(sigmoid(rng.normal(size=(B, T, H, m)))) / 8, q, k, v


def raven(m=5, top=2):
    """Mamba-2's decay times the weights of a token's best slots; the others keep all they have."""
    rng, q, k, v = rows()
    scores = sigmoid(rng.normal(size=(B, T, H, m)))
    chosen = np.where(scores >= np.sort(scores, axis=-1)[..., -top, None], scores, 0)
    decay = -rng.uniform(1, 16, H) * np.log1p(np.exp(rng.normal(size=(B, T, H)) - 1))
    return decay[..., None] * chosen / chosen.sum(axis=-1, keepdims=True), q, k, v


@pytest.mark.parametrize("model", [gsa, raven])
def test_slots_are_two_calls(model):
    f, q, k, v = model()
    expected = slots(f, q, k, v)

    def run(f, q, k, v, **how):
        s = -jnp.expm1(f)
        scores, _ = linear_recurrence(q, k, s, value_log_decay=f, **how)
        return linear_recurrence(jax.nn.softmax(scores), s, v, log_decay=f, **how)[0]

    with jax.enable_x64(True):
        assert error(run(*(jnp.asarray(x) for x in (f, q, k, v)), backend="reference"), expected) < 1e-12
    assert error(run(*(jnp.asarray(x, jnp.float32) for x in (f, q, k, v)), backend="xla", chunk_size=8), expected) < CLOSE


def mixed(rng, shape):
    kind = rng.random(shape)
    return np.where(kind < 0.3, -30, np.where(kind < 0.6, 0, -0.1)).astype(np.float32)


def arguments(t, decay, erase, with_state, with_segments, columns=None, before=False, b=2, h=2, hk=1, k=6, v=5):
    """decay: None, "token", "channel", or "mixed", channels of which some lose everything at once and some nothing; "strong", tokens like
    that. erase: None, "scalar" strengths, "vector" ones, or "apart", with a key of its own. columns: the same as decay for value_log_decay,
    None, "channel" or "mixed". before: whether the erase reads the undecayed state."""
    rng = np.random.default_rng(t)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    keys = unit(normal(b, t, hk, k)).astype(np.float32)
    given: dict = {"q": normal(b, t, hk, k), "k": keys, "v": normal(b, t, h, v)}
    fixed: dict = {}
    if decay == "token":
        given["log_decay"] = -rng.exponential(0.3, (b, t, h)).astype(np.float32)
    elif decay == "channel":
        given["log_decay"] = -rng.exponential(0.5, (b, t, h, k)).astype(np.float32)
    elif decay == "mixed":
        given["log_decay"] = mixed(rng, (b, t, h, k))
    elif decay == "strong":
        given["log_decay"] = mixed(rng, (b, t, h))
    if columns == "channel":
        given["value_log_decay"] = -rng.exponential(0.5, (b, t, h, v)).astype(np.float32)
    elif columns == "mixed":
        given["value_log_decay"] = mixed(rng, (b, t, h, v))
    if before:
        fixed["erase_before_decay"] = True
    if erase:
        strength = rng.random((b, t, h, 1 if erase == "scalar" else k)).astype(np.float32)
        given["erase_read"] = strength * np.repeat(keys, h // hk, axis=2)
        given["write_strength"] = strength[..., 0] if erase == "scalar" else rng.random((b, t, h, v)).astype(np.float32)
        if erase == "apart":
            given["erase_write"] = unit(normal(b, t, h, k)).astype(np.float32)
    if with_state:
        given["initial_state"] = normal(b, h, k, v)
    if with_segments:
        fixed["segment_ids"] = documents(b, t)
        if with_state:
            first = [row[row != 0][0] for row in fixed["segment_ids"]]
            fixed["initial_segment"] = np.array([first[0], *[2] * (b - 1)], np.int32)
    return given, fixed


def compare(form, given, fixed, close):
    (o, state), gradients = results(functools.partial(form, scale=0.7, return_state=True), given, fixed)
    (o_, state_), gradients_ = exactly(functools.partial(reference.recurrent, scale=0.7, return_state=True), given, fixed)
    assert error(o, o_) < close and error(state, state_) < close
    assert set(gradients) == set(gradients_) == set(given)
    for name in gradients_:
        assert error(gradients[name], gradients_[name]) < close, name


CASES = [
    # t, chunk, decay, erase, state, segments
    (1, None, "token", "scalar", True, True),
    (63, 10, "channel", None, True, True),
    (63, 16, None, "scalar", False, False),
    (63, 16, "token", "scalar", True, True),
    (63, 32, "channel", "apart", True, True),
    (65, 64, "mixed", None, True, True),
    (5, None, "mixed", "apart", False, False),
    (130, 64, "channel", "vector", True, True),
]
BEFORE_DECAY = [
    # t, chunk, decay, erase, state, segments, columns, erase before decay
    (1, None, "token", "scalar", True, True, None, True),
    (63, 16, None, "scalar", True, True, None, True),
    (63, 16, "token", "scalar", True, True, None, True),
    (65, 64, "strong", "scalar", True, True, None, True),
    (63, 32, "channel", "apart", True, True, None, True),
    (5, None, "mixed", "apart", False, False, None, True),
    (130, 64, "mixed", "vector", True, True, None, True),
]
COLUMNS = [
    (1, None, None, None, True, True, "channel"),
    (63, 10, None, None, True, True, "channel"),
    (5, None, None, None, False, False, "mixed"),
    (130, 64, "token", None, True, True, "mixed"),
    (65, 32, "mixed", None, True, True, "mixed"),
]
WIDE = [
    (1000, None, decay, erase, True, True, columns, erase is not None and columns is None)
    for decay, erase, columns in (
        ("token", None, None),
        ("channel", None, None),
        ("mixed", "vector", None),
        ("token", "apart", None),
        ("mixed", None, "mixed"),
    )
]
WIDE += [(1000, None, decay, erase, True, True) for decay, erase in (("mixed", "vector"), ("token", "apart"))]


@pytest.mark.parametrize(
    "case",
    [*CASES, *BEFORE_DECAY, *COLUMNS, *(pytest.param(case, marks=pytest.mark.slow) for case in WIDE)],
    ids=lambda case: " ".join(map(str, case)),
)
def test_xla_is_the_recurrence(case):
    t, chunk, *kind = case
    compare(functools.partial(linear_recurrence, chunk_size=chunk, backend="xla"), *arguments(t, *kind), CLOSE)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize(
    "kind", [("channel", None, True, True, "channel"), ("channel", "apart", True, True, None, True)], ids=["columns", "erase before decay"]
)
def test_padding_full_of_nan_touches_nothing(backend, kind):
    given, fixed = arguments(63, *kind, hk=2)
    real = fixed["segment_ids"] != 0
    form = functools.partial(linear_recurrence, return_state=True, chunk_size=16, backend=backend)

    def filled(value):
        return {name: x if name == "initial_state" else np.where(real[:, :, None, None], x, value) for name, x in given.items()}

    clean, dirty = (results(form, filled(np.float32(value)), fixed) for value in (0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert np.all(np.isfinite(dirty[0][1]))
    for name in given.keys() - {"initial_state"}:
        assert np.all(np.asarray(dirty[1][name])[~real] == 0), name


def test_erasing_after_the_decay_is_another_recurrence():
    """With e = beta k exp(-g) the two agree, up to the gates that fp32 can divide by; with the same e they differ."""
    given, fixed = arguments(21, "token", "scalar", True, True)
    divided = given | {"erase_read": given["erase_read"] * np.exp(-given["log_decay"])[..., None]}
    o, after, divided_o = (
        linear_recurrence(**x, **fixed, erase_before_decay=before)[0] for x, before in ((given, True), (given, False), (divided, False))
    )
    assert error(divided_o, o) < CLOSE and error(after, o) > 0.01


def test_columns_that_decay_and_are_erased_are_served_by_the_reference():
    given, fixed = arguments(21, "channel", "apart", True, True, "channel")
    o, state = linear_recurrence(**given, **fixed, return_state=True)
    after = given.pop("initial_state")
    o_, state_ = reference.recurrent(**given, **fixed, initial_state=jnp.asarray(after), return_state=True)
    assert error(o, o_) < CLOSE and error(state, state_) < CLOSE
    with pytest.raises(ValueError, match=r"linear_recurrence.*xla.*value_log_decay.*erase_read"):
        linear_recurrence(**given, **fixed, backend="xla")


def walks_of_16(joined=None):
    """Walks in plain jnp over chunks of 16 tokens."""
    forms = walks_by_einsum.walk, walks_by_einsum.delta_walk, walks_by_einsum.solve, walks_by_einsum.solve_transposed
    return passes.Walks(*forms, lambda *_: 16, joined)


@pytest.mark.parametrize(
    ("case", "joined"),
    [
        ((63, None, None, False, False), None),
        ((63, "token", None, True, True), None),
        ((63, "channel", None, True, True), None),
        ((63, None, "scalar", True, True), None),
        ((63, None, "scalar", True, True), walks_by_einsum.walk),
        ((63, "token", "vector", True, True), None),
        ((63, "token", "scalar", True, True), walks_by_einsum.walk),
        ((100, "channel", "vector", True, True), None),
        ((63, "strong", "scalar", True, True, None, True), None),
        ((100, "channel", "vector", True, True, None, True), None),
        ((63, "token", "apart", True, True), None),
        ((63, "channel", "apart", False, True, None, True), None),
    ],
    ids=lambda case: " ".join(map(str, case)) if isinstance(case, tuple) else "joined" if case else "apart",
)
def test_gradients_are_walks(case, joined, monkeypatch):
    """The mathematics that kernel backends share, on walks in plain jnp; the decay's gradient starts afresh every 32 tokens."""
    monkeypatch.setattr(passes, "GROUP", 32)
    monkeypatch.setattr(passes, "CHANNEL_GROUP", 32)
    run = functools.partial(passes.by_walks, walks_of_16(joined))
    absent = dict.fromkeys(("log_decay", "write_strength", "segment_ids"))
    compare(lambda *given, **named: reduced(run, *given, **(absent | named)), *arguments(*case), CLOSE)


@pytest.mark.parametrize("case", [(100, True, True), (63, False, False)], ids=str)
def test_gradients_of_decays_of_columns_are_walks(case, monkeypatch):
    monkeypatch.setattr(passes, "CHANNEL_GROUP", 32)
    t, *kind = case
    given, fixed = arguments(t, None, None, *kind, "channel")
    given["write_strength"] = np.random.default_rng(1).random(given["v"].shape[:3], np.float32)
    compare(functools.partial(columns.by_walks_of_columns, walks_of_16()), given, fixed, CLOSE)


@pytest.mark.parametrize(
    "kind",
    [
        (None, None),
        ("token", "scalar"),
        ("channel", "vector"),
        ("channel", "apart"),
        ("channel", None, "channel"),
        ("channel", "apart", None, True),
        ("token", "scalar", "channel", True),
    ],
    ids=str,
)
def test_steps_are_the_recurrence(kind):
    decay, erase, *more = kind
    given, fixed = arguments(9, decay, erase, True, False, *more)
    o, state = linear_recurrence(**given, **fixed, scale=0.7, return_state=True, backend="reference")
    after = given.pop("initial_state")
    for t in range(9):
        o_t, after = linear_recurrence_step(after, **{name: x[:, t] for name, x in given.items()}, **fixed, scale=0.7)
        assert error(o_t, o[:, t]) < CLOSE
    assert error(after, state) < CLOSE
    with pytest.raises(ValueError, match="linear_recurrence_step: state must be"):
        linear_recurrence_step(after[:, :1], **{name: x[:, 0] for name, x in given.items()})


@functools.cache
def _compiled(chunk: int, kind: str):
    def run(q, k, v, g, state, extra, segments, first):
        return linear_recurrence(
            q,
            k,
            v,
            log_decay=g,
            initial_state=state,
            segment_ids=segments,
            initial_segment=first,
            return_state=True,
            chunk_size=chunk,
            **extra,
            erase_before_decay=kind == "erase before decay",
            backend="xla",
        )

    return jax.jit(run)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_any_documents_and_gates(data):
    """Gates at their bounds and anywhere between, documents and padding wherever they fall."""
    t, chunk = data.draw(st.sampled_from([(1, 16), (11, 4), (11, 16)]))
    kind = data.draw(st.sampled_from(["write", "erase", "erase before decay", "columns"]))
    ids = [np.sort(data.draw(st.lists(st.integers(1, 3), min_size=t, max_size=t))) for _ in range(2)]
    gaps = np.array(data.draw(st.lists(st.booleans(), min_size=2 * t, max_size=2 * t))).reshape(2, t)
    segments = np.where(gaps, 0, np.array(ids)).astype(np.int32)
    first = np.array([data.draw(st.integers(0, 3)) for _ in range(2)], np.int32)
    first = np.minimum(first, np.where(segments == 0, 9, segments).min(axis=1)).astype(np.int32)
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    q, k, v, state = (rng.normal(size=size).astype(np.float32) for size in ((2, t, 1, 3), (2, t, 1, 3), (2, t, 2, 4), (2, 2, 3, 4)))
    k = unit(k).astype(np.float32)
    g = -data.draw(st.sampled_from([0.0, 0.1, 8.0, 60.0])) * rng.random((2, t, 2, 3), np.float32)
    beta = data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    e, w = beta * np.repeat(k, 2, 2), np.full((2, t, 2), beta, np.float32)
    c = -data.draw(st.sampled_from([0.1, 60.0])) * rng.random((2, t, 2, 4), np.float32)
    extra = {"write": {}, "columns": {"value_log_decay": jnp.asarray(c)}}.get(
        kind, {"erase_read": jnp.asarray(e), "write_strength": jnp.asarray(w)}
    )
    o, after = _compiled(chunk, kind)(q, k, v, g, state, extra, segments, first)
    more = {"initial_state": state, "segment_ids": segments, "initial_segment": first, "erase_before_decay": kind == "erase before decay"}
    o_, after_ = reference.recurrent(q, k, v, log_decay=jnp.asarray(g), return_state=True, **extra, **more)
    assert error(o, o_) < CLOSE and error(after, after_) < CLOSE


@pytest.mark.parametrize("c", [1, 5, 16])
def test_inverses_of_unit_triangles(c):
    lower = jnp.tril(jax.random.normal(jax.random.key(c), (3, c, c)), -1)
    exact = np.linalg.inv(np.eye(c) + np.asarray(lower, np.float64))
    weights = jax.random.normal(jax.random.key(1), lower.shape)
    for inverse in (triangles.unit_inverse, triangles.unit_inverse_by_ladder):
        assert error(jax.jit(inverse)(lower), exact) < CLOSE
    found = jax.jit(jax.grad(lambda x: jnp.sum(weights * triangles.unit_inverse(x))))(lower)
    expected = jax.grad(lambda x: jnp.sum(weights * jnp.linalg.inv(jnp.eye(c) + jnp.tril(x, -1))))(lower)
    assert error(found, expected) < 10 * CLOSE
