"""Every published model's arguments against a recurrence of its own, written in its paper's terms in numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_kernels.test_linear_recurrence import CLOSE, error, linear_recurrence
from tests.pallas_kernels.test_linear_recurrence_family import unit

B, T, H, K, V = 2, 21, 2, 6, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rows(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    return rng, normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)


def scan_tokens(step, q, v):
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
    o = scan_tokens(lambda s, b, t, h: np.exp(-slopes[h]) * s + np.outer(k[b, t, h], v[b, t, h]), q, v)
    return {"q": q, "k": k, "v": v, "log_decay": -slopes}, o


def gla():
    rng, q, k, v = rows()
    alpha = sigmoid(rng.normal(size=(B, T, H, K))) ** (1 / 16)
    o = scan_tokens(lambda s, b, t, h: alpha[b, t, h][:, None] * s + np.outer(k[b, t, h], v[b, t, h]), q, v)
    return {"q": q, "k": k, "v": v, "log_decay": np.log(alpha)}, o


def mamba2():
    rng, _, _, x = rows()
    dt, a = np.log1p(np.exp(rng.normal(size=(B, T, H)) - 3)), rng.uniform(1, 16, H)
    one_b, one_c = rng.normal(size=(B, T, 1, K)), rng.normal(size=(B, T, 1, K))
    step = lambda s, b, t, h: np.exp(-a[h] * dt[b, t, h]) * s + dt[b, t, h] * np.outer(one_b[b, t, 0], x[b, t, h])  # noqa: E731
    o = scan_tokens(step, np.repeat(one_c, H, 2), x)
    return {"q": one_c, "k": one_b, "v": x, "log_decay": -a * dt, "write_strength": dt}, o


def delta(gate: str):
    """DeltaNet and its gated kin: what is stored under k moves towards v by the share beta, after the decay."""
    rng, q, k, v = rows()
    k, beta = unit(k), sigmoid(rng.normal(size=(B, T, H)))
    g = {
        "none": np.zeros((B, T, H, 1)),
        "head": -rng.exponential(0.3, (B, T, H, 1)),
        "channel": -rng.exponential(0.3, (B, T, H, K)),
    }[gate]

    def step(s, b, t, h):
        s = np.exp(g[b, t, h])[:, None] * s
        key = k[b, t, h]
        return s + np.outer(key, beta[b, t, h] * (v[b, t, h] - s.T @ key))

    given = {"q": q, "k": k, "v": v, "erase_read": beta[..., None] * k, "write_strength": beta}
    if gate != "none":
        given["log_decay"] = g[..., 0] if gate == "head" else g
    return given, scan_tokens(step, q, v)


def gated_delta_net_2():
    rng, q, k, v = rows()
    k, b_erase, w_write = unit(k), sigmoid(rng.normal(size=(B, T, H, K))), sigmoid(rng.normal(size=(B, T, H, V)))
    g = -rng.exponential(0.3, (B, T, H, K))

    def step(s, b, t, h):
        s = np.exp(g[b, t, h])[:, None] * s
        return s + np.outer(k[b, t, h], w_write[b, t, h] * v[b, t, h] - s.T @ (b_erase[b, t, h] * k[b, t, h]))

    return {"q": q, "k": k, "v": v, "log_decay": g, "erase_read": b_erase * k, "write_strength": w_write}, scan_tokens(
        step, q, v
    )


def rwkv7():
    rng, r, k, v = rows()
    w = np.exp(-np.exp(-0.5) * sigmoid(rng.normal(size=(B, T, H, K))))
    a, kk = sigmoid(rng.normal(size=(B, T, H, K))), unit(rng.normal(size=(B, T, H, K)))

    def step(s, b, t, h):
        transition = np.diag(w[b, t, h]) - np.outer(a[b, t, h] * kk[b, t, h], kk[b, t, h])
        return transition @ s + np.outer(k[b, t, h], v[b, t, h])

    given = {
        "q": r,
        "k": k,
        "v": v,
        "log_decay": np.log(w),
        "erase_read": kk,
        "erase_write": a * kk,
        "erase_before_decay": True,
    }
    return given, scan_tokens(step, r, v)


def comba():
    """A scalar decay plus low rank, S_t = (exp(g) - beta k p^T) S_{t-1} + beta k v^T, gates strong enough that
    exp(-g) would overflow."""
    rng, q, k, v = rows()
    k, beta = unit(k), sigmoid(rng.normal(size=(B, T, H)))
    p, g = sigmoid(1.0) * k, -np.where(rng.random((B, T, H)) < 0.2, 800, rng.exponential(0.3, (B, T, H)))
    q = q - 0.02 * p

    def step(s, b, t, h):
        transition = np.exp(g[b, t, h]) * np.eye(K) - beta[b, t, h] * np.outer(k[b, t, h], p[b, t, h])
        return transition @ s + beta[b, t, h] * np.outer(k[b, t, h], v[b, t, h])

    erase = {"erase_read": beta[..., None] * p, "erase_before_decay": True}
    return {"q": q, "k": k, "v": v, "log_decay": g, "write_strength": beta, **erase}, scan_tokens(step, q, v)


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
    """Two passes over m slots that are overwritten by the share 1 - exp f, K~ (m, k) and V~ (m, v): o_t = V~_t^T
    softmax(K~_t q_t)."""
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
    assert (
        error(run(*(jnp.asarray(x, jnp.float32) for x in (f, q, k, v)), backend="xla", chunk_size=8), expected) < CLOSE
    )
