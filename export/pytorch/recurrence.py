"""What recurrent mixers on a matrix per head share.

    S_t = Diag(exp(g_t)) S_{t-1} + k_t (w_t v_t - e_t^T Diag(exp(g_t)) S_{t-1})^T,   o_t = scale q_t^T S_t

Tokens are taken one after another, as the definition reads; padding changes no state.
"""

import torch
from parts import Taps, split_heads
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
                y, after[name] = self.convolutions[name](y, tokens, state.get(name))
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
