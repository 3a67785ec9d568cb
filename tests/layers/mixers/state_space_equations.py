"""State space models and Hyena-2 as their papers have them, token by token in numpy, float64, beside
paper_equations.py."""

from __future__ import annotations

import math

import numpy as np

from recollect import layers
from tests.layers.mixers.paper_equations import B, T, rms, sigmoid, silu, softplus, split


def convolved(w, path, y):
    """bias + sum_j taps[j] y_{t-j}, channels of one filter next to each other."""
    taps = w[f"{path}.taps"]
    taps = np.repeat(taps, y.shape[-1] // taps.shape[1], axis=1)
    out = np.zeros_like(y) + w.arrays.get(f"{path}.bias", 0)
    for lag, tap in enumerate(taps):
        out[:, lag:] += tap * y[:, : max(T - lag, 0)]
    return out


def erf_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def diagonal(w):
    """A (h, n), C and dt (h, 1)."""
    a = -np.exp(w["space.log_rate"]) + 1j * w["space.frequency"]
    return a, w["space.output_real"] + 1j * w["space.output_imag"], np.exp(w["space.log_step"])[:, None]


def mamba(w, x, config):
    u = silu(convolved(w, "convolution", w.linear("input", x)))
    dt = softplus(w.linear("step_up", w.linear("step_down", u)) + w["step_bias"])
    write, read = w.linear("write", u), w.linear("read", u)
    a, y = -np.exp(w["log_rate"]), np.zeros_like(u)
    for b in range(B):
        h = np.zeros(a.shape)
        for t in range(T):
            h = np.exp(dt[b, t][:, None] * a) * h + np.outer(dt[b, t] * u[b, t], write[b, t])
            y[b, t] = h @ read[b, t] + w["skip"] * u[b, t]
    return y * silu(w.linear("gate", x))


def s4d(w, x, config):
    """What the two last projections take."""
    a, c, dt = diagonal(w)
    y = np.zeros_like(x)
    for b in range(B):
        state = np.zeros(a.shape, complex)
        for t in range(T):
            # Exact for an input that is constant within a step: the integral of exp(A s) over it.
            state = np.exp(dt * a) * state + (np.exp(dt * a) - 1) / a * x[b, t][:, None]
            y[b, t] = 2 * (c * state).sum(-1).real + w["skip"] * x[b, t]
    return erf_gelu(y)


def h3(w, x, config):
    a, c, dt = diagonal(w)
    heads = a.shape[0]
    k = w.linear("key", x)
    k = convolved(w, "shift", k) + w["shift_skip"] * k
    q, k, v = (split(y, heads) for y in (w.linear("query", x), k, w.linear("value", x)))
    o = np.zeros(v.shape)
    for b in range(B):
        for i in range(heads):
            state = np.zeros((a.shape[1], k.shape[-1], v.shape[-1]), complex)
            for t in range(T):
                kv = np.outer(k[b, t, i], v[b, t, i])
                for n in range(a.shape[1]):  # implicit midpoint: (1 - dt A / 2) x = (1 + dt A / 2) x_before + dt u
                    half = dt[i, 0] * a[i, n] / 2
                    state[n] = ((1 + half) * state[n] + dt[i, 0] * kv) / (1 - half)
                y = 2 * np.einsum("n,nkv->kv", c[i], state).real + w["skip"][i] * kv
                o[b, t, i] = q[b, t, i] @ y
    return o.reshape(B, T, -1)


def hyena2(w, x, config):
    q, k, v = np.split(convolved(w, "convolution", w.linear("input", x)), 3, axis=-1)
    z = k * v
    channels = z.shape[-1] // (config.groups or z.shape[-1])
    if config.filter == "LI":
        exponents = np.exp(w["filter.log_scale"]) * np.exp(w["filter.log_rate"])
        taps = [(w["filter.residue"] * np.exp(-exponents * j)).sum(-1) for j in range(T)]
    else:
        taps = w["filter.taps"]
        if config.filter == "MR":
            length, groups = taps.shape
            decays = 10.0 ** np.linspace({"weak": -2, "normal": -1, "strong": 0}[config.decay], 2, groups)
            taps = taps * np.exp(-np.outer(np.arange(length) / (length - 1), decays))
    y = np.zeros_like(z) if config.filter == "SE" else w["skip"] * z
    for t in range(T):
        for j in range(min(t + 1, len(taps))):
            y[:, t] += np.repeat(taps[j], channels) * z[:, t - j]
    return q * y


def mamba3(w, x, config):
    """The state is the paper's: both writes of a token stand in its step."""
    h, g = config.heads, config.key_heads
    q, k = (split(w.linear(name, x), g) for name in ("query", "key"))
    q, k = (rms(y) * w[f"{name}_norm.gain"] for y, name in ((q, "query"), (k, "key")))
    q, k = (np.repeat(y, h // g, axis=2) + w[f"{name}_bias"] for y, name in ((q, "query"), (k, "key")))
    v = split(w.linear("value", x), h)
    dt, share = softplus(w.linear("step", x) + w["step_bias"]), sigmoid(w.linear("share", x))
    a = np.exp(-np.maximum(softplus(w.linear("rate", x)), 1e-4) * dt)
    phase = np.cumsum(np.pi * np.tanh(w.linear("angle", x))[:, :, None] * dt[..., None], axis=1)

    def turned(y):
        y, n = y.copy(), phase.shape[-1]
        complex_pairs = (y[..., 0 : 2 * n : 2] + 1j * y[..., 1 : 2 * n : 2]) * np.exp(1j * phase)
        y[..., 0 : 2 * n : 2], y[..., 1 : 2 * n : 2] = complex_pairs.real, complex_pairs.imag
        return y

    q, k = turned(q), turned(k)
    o = np.zeros(v.shape)
    for b in range(B):
        for i in range(h):
            state = np.zeros((k.shape[-1], v.shape[-1]))
            for t in range(T):
                state = a[b, t, i] * state + share[b, t, i] * dt[b, t, i] * np.outer(k[b, t, i], v[b, t, i])
                if t:
                    before = np.outer(k[b, t - 1, i], v[b, t - 1, i])
                    state += (1 - share[b, t, i]) * dt[b, t, i] * a[b, t, i] * before
                o[b, t, i] = state.T @ q[b, t, i] + w["skip.weight"][i] * v[b, t, i]
    return (o * split(silu(w.linear("gate.projection", x)), h)).reshape(B, T, -1)


STATE_SPACES = {
    "Mamba": (layers.Mamba(state=5), mamba),
    "S4D": (layers.S4D(state=8), s4d),
    "H3": (layers.H3(head_dim=3, state=6, taps=20), h3),
    "Hyena-2, SE": (layers.Hyena2(filter="SE", groups=4), hyena2),
    "Hyena-2, MR": (layers.Hyena2(filter="MR", groups=4, taps=18), hyena2),
    "Hyena-2, LI": (layers.Hyena2(groups=4, order=5), hyena2),
    "Mamba-3": (layers.Mamba3(key_heads=2, key_dim=8), mamba3),
}
"""Name -> config and equation, for test_recurrent_equations.py."""
