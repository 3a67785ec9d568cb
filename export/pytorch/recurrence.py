"""Recurrent mixers on a matrix per head: delta rules, gated linear attention, retention, Mamba-2.

    S_t = Diag(exp(g_t)) S_{t-1} + k_t (w_t v_t - e_t^T Diag(exp(g_t)) S_{t-1})^T,   o_t = scale q_t^T S_t

Tokens are taken one after another, as the definition reads; padding changes no state.
"""

import torch
from parts import Taps, mixer, rotate, split_heads
from torch import nn
from torch.nn import functional as F


def recurrence(q, k, v, state, log_decay=None, write=None, erase=None, scale=1.0):
    """Returns outputs (b, t, h, v) and the state (b, h, k, v) after them.

    q, k (b, t, h, k), v (b, t, h, v), log_decay (b, t, h, 1 or k), write (b, t, h), erase (b, t, h, k): e_t.
    """
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], k.shape[3], v.shape[3])
    if write is not None:
        v = v * write[..., None]
    outputs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            state = log_decay[:, t].exp()[..., None] * state
        new = v[:, t]
        if erase is not None:
            new = new - torch.einsum("bhk,bhkv->bhv", erase[:, t], state)
        state = state + k[:, t, :, :, None] * new[:, :, None]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def retnet_log_decays(heads, x):
    """Returns log(1 - 2^(-5-h)) per head."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, dtype=torch.float32, device=x.device))))


def unit(x):
    """Returns x / sqrt(sum x^2 + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class LowRank(nn.Module):
    """W2 W1 x + bias."""

    def __init__(self, width, rank, outputs, bias=False):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, outputs, bias=bias)

    def forward(self, x):
        return self.up(self.down(x))


class HeadNorm(nn.Module):
    """RMS norm of each head's vector, or over all heads together."""

    def __init__(self, heads, dim, whole=False, epsilon=1e-5):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads, dim) if whole else torch.ones(dim))
        self.axes, self.epsilon = (-2, -1) if whole else -1, epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(self.axes, keepdim=True) + self.epsilon) * self.gain


class StepDecay(nn.Module):
    """dt = softplus(W x + step_bias), log a = -exp(log_rate) dt, per head, or per head and channel."""

    def __init__(self, projection, heads, channels=None):
        super().__init__()
        self.projection = projection
        self.step_bias = nn.Parameter(torch.empty(heads, channels) if channels else torch.empty(heads))
        self.log_rate = nn.Parameter(torch.empty(heads))

    def forward(self, x):
        step = F.softplus(self.projection(x).unflatten(-1, self.step_bias.shape) + self.step_bias)
        rate = self.log_rate.exp()
        return -(rate if step.ndim == 3 else rate[:, None]) * step, step


class Gate(nn.Module):
    """norm(o) * activation(W x), or norm(o * activation(W x)); without a projection norm(o)."""

    def __init__(self, projection, norm, activation=F.silu, gate_first=False):
        super().__init__()
        self.projection, self.norm, self.activation, self.gate_first = projection, norm, activation, gate_first

    def forward(self, o, x):
        if self.projection is None:
            return self.norm(o).flatten(2)
        gate = self.activation(self.projection(x)).reshape(o.shape)
        return (self.norm(o * gate) if self.gate_first else self.norm(o) * gate).flatten(2)


class Recurrent(nn.Module):
    """Base: projections into heads, short convolutions with SiLU, the recurrence, gate and last projection."""

    value_share, key_share, activates, convolution_bias = 1.0, 1.0, False, False

    def __init__(self, config, width, index):
        super().__init__()
        self.config, self.heads = config, config["heads"]
        self.key_heads = config.get("key_heads") or self.heads
        self.key_dim = config["key_dim"] or max(1, int(width // self.heads * self.key_share))
        self.value_dim = config["value_dim"] or int(width // self.heads * self.value_share)
        keys, values = self.key_heads * self.key_dim, self.heads * self.value_dim
        self.query, self.key = nn.Linear(width, keys, bias=False), nn.Linear(width, keys, bias=False)
        self.value, self.output = nn.Linear(width, values, bias=False), nn.Linear(values, width, bias=False)
        kernel, bias = config.get("kernel"), self.convolution_bias
        sizes = {"query": keys, "key": keys, "value": values} if kernel else {}
        parts = {name: Taps(size, kernel, bias) for name, size in sizes.items()}
        self.convolutions = nn.ModuleDict(parts)
        self.build(width)

    def build(self, width):
        """Makes what a member has beside the projections."""

    def operands(self, x, q, k, v, tokens):
        """Returns the arguments of `recurrence` from heads' q, k and v."""
        raise NotImplementedError

    def mixed(self, o, v):
        """Returns the outputs that the gate takes."""
        return o

    def forward(self, x, tokens, state):
        state = state or {}
        after, heads = {}, []
        for name, linear in (("query", self.query), ("key", self.key), ("value", self.value)):
            y = linear(x)
            if name in self.convolutions:
                y, after[name] = self.convolutions[name](y, state.get(name))
            if name in self.convolutions or self.activates:
                y = F.silu(y)
            heads.append(split_heads(y, self.heads if name == "value" else self.key_heads))
        q, k, v = heads
        repeats = self.heads // self.key_heads
        q, k, v, options = self.operands(x, q.repeat_interleave(repeats, 2), k.repeat_interleave(repeats, 2), v, tokens)
        real = tokens.real[..., None, None]
        if options.get("log_decay") is not None:
            options["log_decay"] = options["log_decay"] * real
        o, after["memory"] = recurrence(q, k * real, v, state.get("memory"), **options)
        return self.output(self.gate(self.mixed(o, v), x)), after


class DeltaRule(Recurrent):
    """What is stored under a key moves towards the new value by the share beta."""

    activates = True

    def build(self, width):
        self.strength = nn.ModuleDict({"projection": nn.Linear(width, self.heads, bias=False)})

    def log_decay(self, x):
        """Returns the logarithm of the decay, or None."""

    def operands(self, x, q, k, v, tokens):
        q, k = unit(q), unit(k)
        beta = self.strength["projection"](x).sigmoid() * (2.0 if self.config["negative_eigenvalues"] else 1.0)
        options = {"log_decay": self.log_decay(x), "write": beta, "erase": beta[..., None] * k}
        return q, k, v, options | {"scale": self.key_dim**-0.5}


@mixer
class DeltaNet(DeltaRule):
    """The delta rule on a state that does not decay."""

    def build(self, width):
        super().build(width)
        projection = nn.Linear(width, self.heads * self.value_dim, bias=False) if self.config["gate"] else None
        self.gate = Gate(projection, HeadNorm(self.heads, self.value_dim))


@mixer
class GatedDeltaNet(DeltaRule):
    """The delta rule on a state that decays, per head."""

    def build(self, width):
        super().build(width)
        self.decay = StepDecay(nn.Linear(width, self.heads, bias=False), self.heads)
        norm = HeadNorm(self.heads, self.value_dim, epsilon=self.config["norm_epsilon"])
        self.gate = Gate(nn.Linear(width, self.heads * self.value_dim, bias=False), norm)

    def log_decay(self, x):
        return self.decay(x)[0][..., None]


@mixer
class KimiDeltaAttention(DeltaRule):
    """The delta rule on a state whose key channels decay each at its own rate."""

    def build(self, width):
        super().build(width)
        rank, channels = self.value_dim, self.heads * self.key_dim
        self.decay = StepDecay(LowRank(width, rank, channels), self.heads, self.key_dim)
        projection = LowRank(width, rank, self.heads * self.value_dim, bias=self.config["gate_bias"])
        self.gate = Gate(projection, HeadNorm(self.heads, self.value_dim), torch.sigmoid)

    def log_decay(self, x):
        return self.decay(x)[0]


@mixer
class GatedLinearAttention(Recurrent):
    """Linear attention with a decay per key channel, from a low-rank map of the input."""

    key_share = 0.5

    def build(self, width):
        projection = LowRank(width, self.config["rank"], self.heads * self.key_dim, bias=True)
        self.decay = nn.ModuleDict({"projection": projection})
        linear = nn.Linear(width, self.heads * self.value_dim, bias=False)
        self.gate = Gate(linear, HeadNorm(self.heads, self.value_dim))

    def operands(self, x, q, k, v, tokens):
        logits = split_heads(self.decay["projection"](x), self.heads)
        decay = F.logsigmoid(logits) / self.config["temperature"]
        return q, k, v, {"log_decay": decay, "scale": self.key_dim**-0.5}


@mixer
class Retention(Recurrent):
    """Linear attention with a constant decay per head, and rotary positions."""

    value_share = 2.0

    def build(self, width):
        linear = nn.Linear(width, self.heads * self.value_dim, bias=False)
        self.gate = Gate(linear, HeadNorm(self.heads, self.value_dim))

    def operands(self, x, q, k, v, tokens):
        if self.config["positions"] is not None:
            q, k = (rotate(y, tokens.positions, self.config["positions"]) for y in (q, k))
        decay = retnet_log_decays(self.heads, x)[:, None].expand(*x.shape[:2], -1, 1)
        return q, k, v, {"log_decay": decay, "scale": self.key_dim**-0.5}


@mixer
class Mamba2(Recurrent):
    """A state space model with one decay per head and token; B are the keys, C the queries, x the values."""

    value_share, convolution_bias = 2.0, True

    def build(self, width):
        self.decay = StepDecay(nn.Linear(width, self.heads, bias=False), self.heads)
        self.skip = nn.ParameterDict({"weight": nn.Parameter(torch.ones(self.heads))})
        norm = HeadNorm(self.heads, self.value_dim, whole=True)
        self.gate = Gate(nn.Linear(width, self.heads * self.value_dim, bias=False), norm, gate_first=True)

    def operands(self, x, q, k, v, tokens):
        log_decay, step = self.decay(x)
        return q, k, v, {"log_decay": log_decay[..., None], "write": step}

    def mixed(self, o, v):
        return o + self.skip["weight"][:, None] * v
