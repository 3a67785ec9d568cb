"""Recurrent mixers that read by levels, solve for what they read or learn while they read, as their papers have them,
token by token in numpy, float64. Nothing of the project's arithmetic is called here."""

from __future__ import annotations

import numpy as np

from tests.layers.mixers.paper_equations import B, T, delta_rule_inputs, rms, sigmoid, silu, softplus, split, unit


def level(t, s):
    """Of token s <= t in the Fenwick tree of Guo et al.: found by taking the largest power of two from what is left."""
    if s == t:
        return 0
    start = 0
    while True:
        size = 1 << ((t - start).bit_length() - 1)
        if s < start + size:
            return size.bit_length()
        start += size


def read_by_levels(transition, q, k, v, weights):
    """o_t = sum_s lambda_t^(level of s) q_t . (A_t ... A_(s+1) k_s) v_s, by a product of transitions per pair."""
    o = np.zeros((B, T, q.shape[2], v.shape[-1]))
    for b, t, i in np.ndindex(B, T, q.shape[2]):
        row = q[b, t, i]  # q_t^T A_t ... A_(s+1)
        for s in range(t, -1, -1):
            o[b, t, i] += weights[b, t, i, level(t, s)] * (row @ k[b, s, i]) * v[b, s, i]
            row = row @ transition(b, s, i)
    return o


def level_weights(w, x, heads):
    return softplus(w["levels.scale"] * split(w.linear("levels.projection", x), heads))


def log_linear_mamba2(w, x, config):
    h, g = config.heads, config.key_heads
    c, bs = (np.repeat(split(w.convolved(name, x), g), h // g, 2) for name in ("query", "key"))
    v = split(w.convolved("value", x), h)
    log_a, dt = w.steps(x)
    y = read_by_levels(
        lambda b, t, i: np.exp(log_a[b, t, i]) * np.eye(c.shape[-1]), c, dt[..., None] * bs, v, level_weights(w, x, h)
    )
    z = split(silu(w.linear("gate.projection", x)), h)
    y = y + w["skip.weight"][:, None] * v
    return (rms(y * z, axis=(-2, -1)) * w["gate.norm.gain"]).reshape(B, T, -1)


def log_linear_gated_delta_net(w, x, config):
    h = config.heads
    q, k, v = delta_rule_inputs(w, x, h, config.key_heads or h)
    beta, a = sigmoid(w.linear("strength.projection", x)), np.exp(w.steps(x)[0])

    def transition(b, t, i):
        key = k[b, t, i]
        return a[b, t, i] * (np.eye(len(key)) - beta[b, t, i] * np.outer(key, key))

    o = read_by_levels(transition, q, beta[..., None] * k, v, level_weights(w, x, h))
    return w.gated(o, x, silu)


def mesa_net(w, x, config):
    """Solved exactly."""
    h = config.heads
    q, k = (unit(split(w.convolved(name, x), h)) for name in ("query", "key"))
    v = split(w.linear("value", x), h)
    g, beta = sigmoid(w.linear("decay.projection", x)), sigmoid(w.linear("strength", x))
    ridge = softplus(w["ridge"]) + 0.25
    o = np.zeros(v.shape)
    for b in range(B):
        for i in range(h):
            keys, values = np.zeros((k.shape[-1],) * 2), np.zeros((k.shape[-1], v.shape[-1]))
            for t in range(T):
                keys = g[b, t, i] * keys + beta[b, t, i] * np.outer(k[b, t, i], k[b, t, i])
                values = g[b, t, i] * values + beta[b, t, i] * np.outer(k[b, t, i], v[b, t, i])
                o[b, t, i] = values.T @ np.linalg.solve(keys + np.diag(ridge[i]), q[b, t, i])
    return (rms(o) * w["norm.gain"]).reshape(B, T, -1)


def ttt_linear(w, x, config):
    h = config.heads
    q, k, v = (split(w.linear(name, x), h) for name in ("query", "key", "value"))
    dim, eta = k.shape[-1], config.rate * sigmoid(w.linear("rate", x)) / k.shape[-1]
    o = np.zeros(v.shape)

    def turned(y, place):
        if config.positions is None:
            return y
        half = dim // 2
        angles = place * 10_000.0 ** (-np.arange(half) / half)
        first, second = y[:half], y[half:]
        return np.concatenate(
            [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
        )

    for b, i in np.ndindex(B, h):
        gain, shift = w["gain"][i], w["shift"][i]
        weights = base = w["weights"][i]
        bias = base_bias = w["bias"][i]
        sums, bias_sums = np.zeros_like(weights), np.zeros_like(bias)
        for t in range(T):
            place = t % config.batch
            if place == 0:
                base, base_bias = weights, bias
                sums, bias_sums = np.zeros_like(weights), np.zeros_like(bias)
            query, key = turned(q[b, t, i], place), turned(k[b, t, i], place)
            z = base.T @ key + base_bias
            centred, deviation = z - z.mean(), np.sqrt(z.var() + 1e-6)
            normal = centred / deviation
            into_normal = gain * (gain * normal + shift - (v[b, t, i] - key))
            g = (into_normal - into_normal.mean() - normal * (into_normal * normal).mean()) / deviation
            sums, bias_sums = sums + eta[b, t, i] * np.outer(key, g), bias_sums + eta[b, t, i] * g
            share = max(1 / (place + 1) + w["share"][place], 1e-4)
            weights, bias = base - share * sums, base_bias - share * bias_sums
            z = weights.T @ query + bias
            o[b, t, i] = query + gain * (z - z.mean()) / np.sqrt(z.var() + 1e-6) + shift
    o = o.reshape(B, T, -1)
    return rms(o - o.mean(-1, keepdims=True), epsilon=1e-6) * w["norm.gain"][0] + w["norm.bias"][0]


def titans(w, x, config):
    h = config.heads
    q, k = (unit(split(w.convolved(name, x), h)) for name in ("query", "key"))
    v = split(w.convolved("value", x), h)
    alpha, eta, theta = (sigmoid(w.linear(name, x)) for name in ("keep", "momentum", "rate"))
    o = np.zeros(v.shape)
    for b, i in np.ndindex(B, h):
        memory = surprise = base = np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(T):
            if t % config.batch == 0:
                base = memory
            gradient = np.outer(k[b, t, i], base.T @ k[b, t, i] - v[b, t, i])
            surprise = eta[b, t, i] * surprise - config.rate * theta[b, t, i] / config.batch * gradient
            memory = alpha[b, t, i] * memory + surprise
            o[b, t, i] = memory.T @ q[b, t, i]
    return w.gated(o, x, silu)
