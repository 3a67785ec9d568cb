"""Recurrent mixers as their papers have them, token by token in numpy, float64, from a module's parameters. Nothing of
the project's arithmetic is called here."""

from __future__ import annotations

import numpy as np
from flax import nnx

from recollect.models import flatten

B, T, D = 2, 19, 12


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(x, 0)


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def rms(x, axis=-1, epsilon=1e-5):
    return x / np.sqrt((x**2).mean(axis, keepdims=True) + epsilon)


def split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1)


class Weights:
    """A module's parameters by their paths, float64."""

    def __init__(self, module):
        leaves = flatten(nnx.to_pure_dict(nnx.state(module)))
        self.arrays = {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}

    def __getitem__(self, path):
        return self.arrays[path]

    def linear(self, name, x):
        return x @ self[f"{name}.kernel"] + self.arrays.get(f"{name}.bias", 0)

    def low_rank(self, name, x, activation=lambda x: x):
        return self.linear(f"{name}.up", activation(self.linear(f"{name}.down", x)))

    def convolved(self, name, x):
        """silu(bias + sum_j taps[j] y_{t-j}) of the projection called `name`; without taps silu of it."""
        y = self.linear(name, x)
        taps = self.arrays.get(f"convolutions.{name}.taps")
        if taps is None:
            return silu(y)
        out = np.zeros_like(y) + self.arrays.get(f"convolutions.{name}.bias", 0)
        for lag, tap in enumerate(taps):
            out[:, lag:] += tap * y[:, : y.shape[1] - lag]
        return silu(out)

    def steps(self, x):
        """Mamba's log decay and step."""
        apply = self.low_rank if "decay.projection.up.kernel" in self.arrays else self.linear
        logits = apply("decay.projection", x)
        bias = self["decay.step_bias"]
        step = softplus(logits.reshape(B, T, *bias.shape) + bias)
        rate = np.exp(self["decay.log_rate"])
        return -rate.reshape(rate.shape + (1,) * (step.ndim - 3)) * step, step

    def gated(self, o, x, activation):
        gate = split(activation(self.linear("gate.projection", x)), o.shape[2])
        return (rms(o) * self["gate.norm.gain"] * gate).reshape(B, T, -1)


def loop(step, q, k, v):
    """o_t = S_t^T q_t, from S = 0 (k, v) on; `step(S, b, t, h)` is the next S."""
    o = np.zeros((B, T, q.shape[2], v.shape[-1]))
    for b in range(B):
        for h in range(q.shape[2]):
            state = np.zeros((k.shape[-1], v.shape[-1]))
            for t in range(T):
                state = step(state, b, t, h)
                o[b, t, h] = state.T @ q[b, t, h]
    return o


def delta_rule_inputs(w, x, heads, key_heads):
    q, k = (np.repeat(unit(split(w.convolved(name, x), key_heads)), heads // key_heads, 2) for name in ("query", "key"))
    return q / np.sqrt(q.shape[-1]), k, split(w.convolved("value", x), heads)


def delta_net(w, x, config):
    h = config.heads
    q, k, v = delta_rule_inputs(w, x, h, config.key_heads or h)
    beta = sigmoid(w.linear("strength.projection", x)) * (2 if config.negative_eigenvalues else 1)

    def step(s, b, t, i):
        key = k[b, t, i]
        return s + np.outer(key, beta[b, t, i] * (v[b, t, i] - s.T @ key))

    o = loop(step, q, k, v)
    if config.gate:
        return w.gated(o, x, silu)
    return (rms(o) * w["gate.norm.gain"]).reshape(B, T, -1)


def gated_delta_net(w, x, config):
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, as equation 10 has it."""
    h = config.heads
    q, k, v = delta_rule_inputs(w, x, h, config.key_heads or h)
    beta = sigmoid(w.linear("strength.projection", x)) * (2 if config.negative_eigenvalues else 1)
    a = np.exp(w.steps(x)[0])

    def step(s, b, t, i):
        key = k[b, t, i]
        return a[b, t, i] * (np.eye(len(key)) - beta[b, t, i] * np.outer(key, key)) @ s + beta[b, t, i] * np.outer(
            key, v[b, t, i]
        )

    return w.gated(loop(step, q, k, v), x, silu)


def kimi_delta_attention(w, x, config):
    """S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T."""
    h = config.heads
    q, k, v = delta_rule_inputs(w, x, h, h)
    beta, a = sigmoid(w.linear("strength.projection", x)), np.exp(w.steps(x)[0])
    if config.bound is not None:
        logits = split(w.low_rank("decay.projection", x), h) + w["decay.step_bias"]
        a = np.exp(-config.bound * sigmoid(np.exp(w["decay.log_rate"])[:, None] * logits))

    def step(s, b, t, i):
        key = k[b, t, i]
        erased = (np.eye(len(key)) - beta[b, t, i] * np.outer(key, key)) @ np.diag(a[b, t, i])
        return erased @ s + beta[b, t, i] * np.outer(key, v[b, t, i])

    o = loop(step, q, k, v)
    gate = sigmoid(split(w.low_rank("gate.projection", x), h))
    return (rms(o) * w["gate.norm.gain"] * gate).reshape(B, T, -1)


def gated_delta_net_2(w, x, config):
    h = config.heads
    q, k, v = delta_rule_inputs(w, x, h, h)
    erase, write = (sigmoid(split(w.linear(name, x), h)) for name in ("erase", "write"))
    erase = erase * (2 if config.negative_eigenvalues else 1)
    a = np.exp(w.steps(x)[0])

    def step(s, b, t, i):
        s = a[b, t, i][:, None] * s
        return s + np.outer(k[b, t, i], write[b, t, i] * v[b, t, i] - s.T @ (erase[b, t, i] * k[b, t, i]))

    o = loop(step, q, k, v)
    gate = sigmoid(split(w.low_rank("gate.projection", x), h))
    return (rms(o) * w["gate.norm.gain"] * gate).reshape(B, T, -1)


def delta_product(w, x, config):
    """Householder steps one after another; only the first sees the decay."""
    h, n = config.heads, config.steps
    q = unit(split(w.convolved("query", x), h))
    k, v = unit(w.convolved("key", x).reshape(B, T, n, h, -1)), w.convolved("value", x).reshape(B, T, n, h, -1)
    beta = sigmoid(w.linear("strength.projection", x)).reshape(B, T, n, h) * (2 if config.negative_eigenvalues else 1)
    a = np.exp(w.steps(x)[0]) if config.decays else np.ones((B, T, h))

    def step(s, b, t, i):
        s = a[b, t, i] * s
        for j in range(n):
            key = k[b, t, j, i]
            s = s - beta[b, t, j, i] * np.outer(key, s.T @ key) + beta[b, t, j, i] * np.outer(key, v[b, t, j, i])
        return s

    o = loop(step, q / np.sqrt(q.shape[-1]), k, v)
    return w.gated(o, x, silu)


def comba(w, x, config):
    h = config.heads
    q, k, v = delta_rule_inputs(w, x, h, h)
    p = sigmoid(w["inner_decay"])[:, None] * k
    q = q - w["correction"][:, None] * p / np.sqrt(k.shape[-1])
    beta, a = sigmoid(w.linear("strength.projection", x)), np.exp(w.steps(x)[0])

    def step(s, b, t, i):
        transition = a[b, t, i] * np.eye(k.shape[-1]) - beta[b, t, i] * np.outer(k[b, t, i], p[b, t, i])
        return transition @ s + beta[b, t, i] * np.outer(k[b, t, i], v[b, t, i])

    return w.gated(loop(step, q, k, v), x, sigmoid)


def mamba2(w, x, config):
    h, g = config.heads, config.key_heads
    c, bs = (np.repeat(split(w.convolved(name, x), g), h // g, 2) for name in ("query", "key"))
    v = split(w.convolved("value", x), h)
    log_a, dt = w.steps(x)

    def step(s, b, t, i):
        return np.exp(log_a[b, t, i]) * s + dt[b, t, i] * np.outer(bs[b, t, i], v[b, t, i])

    y = loop(step, c, bs, v) + w["skip.weight"][:, None] * v
    z = split(silu(w.linear("gate.projection", x)), h)
    return (rms(y * z, axis=(-2, -1)) * w["gate.norm.gain"]).reshape(B, T, -1)


def retention(w, x, config):
    h = config.heads
    q, k, v = (split(w.linear(name, x), h) for name in ("query", "key", "value"))
    gamma = 1 - 2.0 ** (-5 - np.arange(h))
    o = loop(lambda s, b, t, i: gamma[i] * s + np.outer(k[b, t, i], v[b, t, i]), q / np.sqrt(k.shape[-1]), k, v)
    return w.gated(o, x, silu)


def gated_linear_attention(w, x, config):
    h = config.heads
    q, k, v = (split(w.linear(name, x), h) for name in ("query", "key", "value"))
    a = split(sigmoid(w.low_rank("decay.projection", x)), h) ** (1 / config.temperature)
    o = loop(
        lambda s, b, t, i: np.diag(a[b, t, i]) @ s + np.outer(k[b, t, i], v[b, t, i]), q / np.sqrt(k.shape[-1]), k, v
    )
    return w.gated(o, x, silu)


def hgrn2(w, x, config):
    h = config.heads
    q, f, v = (split(w.linear(name, x), h) for name in ("query", "key", "value"))
    lower = sigmoid(w["lower.logit"])
    f = lower + (1 - lower) * sigmoid(f)
    o = loop(lambda s, b, t, i: f[b, t, i][:, None] * s + np.outer(1 - f[b, t, i], v[b, t, i]), silu(q), f, v)
    return (rms(o, axis=(-2, -1)) * w["norm.gain"]).reshape(B, T, -1)


def lightning(w, x, config):
    h, plain = config.heads, config.form == "transnormer"
    q, k, v = (split(w.linear(name, x), h) for name in ("query", "key", "value"))
    q, k, v = silu(q), silu(k), v if plain else silu(v)
    share = float(w["depth_share"])
    if config.decay == "code":
        rates = 2.0 ** (-8 * (np.arange(h) + 1) / h) * (1 - share + 1e-5)
    else:
        rates = 8 * np.arange(h) / h * (1 - share)
    o = loop(lambda s, b, t, i: np.exp(-rates[i]) * s + np.outer(k[b, t, i], v[b, t, i]), q, k, v)
    o, u = rms(o, axis=(-2, -1), epsilon=1e-6), split(w.linear("gate.projection", x), h)
    return (o * u if plain else o * w["gate.norm.gain"] * sigmoid(u)).reshape(B, T, -1)


def mlstm(w, x, config):
    """Without the stabiliser: gates small enough for exp as it stands."""
    h = config.heads
    q, k, v = (split(w.linear(name, x), h) for name in ("query", "key", "value"))
    q = q / np.sqrt(k.shape[-1])
    i_gate, f_gate = (15 * np.tanh(w.linear(name, x) / 15) for name in ("input_gate", "forget_gate"))
    i_gate, f_gate = np.exp(i_gate), sigmoid(f_gate)
    o = np.zeros(v.shape)
    for b in range(B):
        for i in range(h):
            c, n = np.zeros((k.shape[-1], v.shape[-1])), np.zeros(k.shape[-1])
            for t in range(T):
                c = f_gate[b, t, i] * c + i_gate[b, t, i] * np.outer(k[b, t, i], v[b, t, i])
                n = f_gate[b, t, i] * n + i_gate[b, t, i] * k[b, t, i]
                o[b, t, i] = c.T @ q[b, t, i] / max(abs(n @ q[b, t, i]), 1)
    return w.gated(o, x, sigmoid)


def rwkv7(w, x, config, first=None):
    """The state as the paper has it, values by keys: S_t = S_{t-1} (Diag(w) - kk^T (a * kk)) + v^T k; `first` are the
    first layer's values (B, T, h v), which later ones mix in."""
    h = config.heads
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    shifted = {name: x + (before - x) * w[f"mixes.{name}.mix"] for name in "rwkvag"}
    r, k, v = (split(w.linear(name, shifted[c]), h) for name, c in (("query", "r"), ("key", "k"), ("value", "v")))
    if first is not None:
        v = v + (split(first, h) - v) * sigmoid(split(w.low_rank("value_share", shifted["v"]), h))
    decay = np.exp(-np.exp(-0.5) * sigmoid(split(w.low_rank("decay", shifted["w"], np.tanh), h)))
    a = sigmoid(split(w.low_rank("strength", shifted["a"]), h))
    kk = unit(k * w["erase_scale"])
    k = k * (1 + (a - 1) * w["key_scale"])
    o = np.zeros(v.shape)
    for b in range(B):
        for i in range(h):
            s = np.zeros((v.shape[-1], k.shape[-1]))
            for t in range(T):
                row = kk[b, t, i][:, None] @ (a[b, t, i] * kk[b, t, i])[None]
                s = s @ (np.diag(decay[b, t, i]) - row) + np.outer(v[b, t, i], k[b, t, i])
                o[b, t, i] = s @ r[b, t, i]
    centred = o - o.mean(-1, keepdims=True)
    o = rms(centred, epsilon=v.shape[-1] * 1e-5) * w["norm.gain"] + w["norm.bias"]
    o = o + (r * k * w["bonus"]).sum(-1, keepdims=True) * v
    return o.reshape(B, T, -1) * w.low_rank("gate", shifted["g"], sigmoid)


def rwkv6(w, x, config):
    h = config.heads
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    z = x + (before - x) * w["mix_all.mix"]
    shifted = {name: x + (before - x) * w.low_rank(f"mixes.{name}", z, np.tanh) for name in "rwkvg"}
    r, k, v = (split(w.linear(name, shifted[c]), h) for name, c in (("query", "r"), ("key", "k"), ("value", "v")))
    decay = np.exp(-np.exp(split(w.low_rank("decay", shifted["w"], np.tanh), h)))
    o = np.zeros(v.shape)
    for b in range(B):
        for i in range(h):
            s = np.zeros((k.shape[-1], v.shape[-1]))
            for t in range(T):
                now = np.outer(k[b, t, i], v[b, t, i])
                o[b, t, i] = r[b, t, i] @ (np.diag(w["bonus"][i]) @ now + s)
                s = np.diag(decay[b, t, i]) @ s + now
    o = rms(o - o.mean(-1, keepdims=True), epsilon=64e-5) * w["gate.norm.gain"] + w["gate.norm.bias"]
    return o.reshape(B, T, -1) * silu(w.linear("gate.projection", shifted["g"]))


def gated_slot_attention(w, x, config):
    h = config.heads
    q, k, v = (split(w.convolved(name, x), h) for name in ("query", "key", "value"))
    a = split(sigmoid(w.linear("decay.projection", x)), h) ** (1 / config.temperature)
    o = np.zeros(v.shape)
    for b in range(B):
        for i in range(h):
            keys, values = np.zeros((a.shape[-1], k.shape[-1])), np.zeros((a.shape[-1], v.shape[-1]))
            for t in range(T):
                kept = a[b, t, i][:, None]
                keys = kept * keys + (1 - kept) * k[b, t, i]
                values = kept * values + (1 - kept) * v[b, t, i]
                weights = np.exp(keys @ q[b, t, i])
                o[b, t, i] = values.T @ (weights / weights.sum())
    return (rms(silu(o), axis=(-2, -1)) * w["norm.gain"]).reshape(B, T, -1)


def channels(a, b):
    """h_t = a_t h_{t-1} + b_t."""
    h, state = np.zeros_like(b), np.zeros_like(b[:, 0])
    for t in range(T):
        state = a[:, t] * state + b[:, t]
        h[:, t] = state
    return h


def hgrn(w, x, config):
    lower = sigmoid(w["lower.logit"])
    f = lower + (1 - lower) * sigmoid(w.linear("forget", x))
    h = channels(f, (1 - f) * silu(w.linear("input", x)))
    return w.gated(h[:, :, None], x, silu)


def min_gru(w, x, config):
    z = sigmoid(w.linear("update", x))
    return channels(1 - z, z * w.linear("candidate", x))


def rg_lru(w, x, config):
    u, taps = w.linear("input", x), w["convolution.taps"]
    convolved = np.zeros_like(u) + w["convolution.bias"]
    for lag, tap in enumerate(taps):
        convolved[:, lag:] += tap * u[:, : T - lag]

    def gate(name):
        y = np.einsum("bthk,hkv->bthv", split(convolved, config.heads), w[f"gates.{name}.kernel"]).reshape(u.shape)
        return sigmoid(y + w[f"gates.{name}.bias"])

    a = np.exp(-8 * softplus(w["rate"]) * gate("recurrence"))
    root = np.sqrt(1 - a**2)
    root[:, 0] = 1
    h, g = channels(a, root * gate("input") * convolved), w.linear("gate", x)
    return 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * h
