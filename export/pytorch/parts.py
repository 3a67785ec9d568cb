"""Parts of the mixers in plain PyTorch: tokens and states, norms, rotation, short convolutions, MLPs.

Modules have the names of the JAX project's, so that weights are found by them; kernels of linear maps are (out, in).
Sizes in comments: b rows, t tokens, h heads, k key dimensions, v value dimensions, d model width, f channels.
"""

import torch
from torch import nn
from torch.nn import functional as F

MIXERS: dict[str, type] = {}
"""Classes of mixers by the names of their configs."""


def mixer(cls):
    """Adds a class to `MIXERS`; it is made from a config, the model's width and the layer's index."""
    MIXERS[cls.__name__] = cls
    return cls


class Tokens:
    """The tokens of one call: `real` (b, t) is false at padding, `positions` (b, t) counts the real ones of a row."""

    def __init__(self, real, positions):
        self.real, self.positions = real, positions


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * gain, over the last axis."""

    def __init__(self, width, epsilon=1e-6):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.gain


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + epsilon) * gain + bias, over the last axis."""

    def __init__(self, width, epsilon=1e-5, bias=True):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.epsilon = epsilon

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gain, self.bias, self.epsilon)


def norm_of(config, width):
    """Returns the norm that a config names."""
    if config["class"] == "RMSNorm":
        return RMSNorm(width, config["epsilon"])
    return LayerNorm(width, config["epsilon"], config["bias"])


def rotate(x, positions, config):
    """Returns x (b, t, h, k) with pairs of dimensions turned by position * base^(-2i/r)."""
    rotated = int(x.shape[-1] * config["fraction"]) // 2 * 2
    rates = config["base"] ** (-torch.arange(0, rotated, 2, dtype=torch.float32, device=x.device) / rotated)
    angles = positions[..., None, None].float() * rates
    cos, sin = angles.cos(), angles.sin()
    head, rest = x[..., :rotated], x[..., rotated:]
    half = config["layout"] == "half"
    a, b = head.chunk(2, -1) if half else (head[..., 0::2], head[..., 1::2])
    pair = [a * cos - b * sin, b * cos + a * sin]
    head = torch.cat(pair, -1) if half else torch.stack(pair, -1).flatten(-2)
    return torch.cat([head, rest], -1)


def append(before, x, real):
    """Returns what earlier calls left, (b, s, ...), and the entries x (b, t, ...) of this one, its padding in front of
    both: where landmarks are inserted, rows without one wait for those with one."""
    joined = torch.cat([before, x], 1)
    if real.all():
        return joined
    order = torch.cat([real.new_ones(before.shape[:2]), real], 1).int().argsort(dim=1, stable=True)
    return joined.gather(1, order.reshape(*order.shape, *[1] * (x.ndim - 2)).expand_as(joined))


class Taps(nn.Module):
    """y_i = bias + sum_j taps[j] x_{i-j} per channel; the state is the last inputs, oldest first. Padding may hold
    anything: zeros, or what came before, stand between it and the tokens."""

    def __init__(self, channels, kernel, bias=False):
        super().__init__()
        self.taps = nn.Parameter(torch.empty(kernel, channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x, tokens, state):
        kernel = self.taps.shape[0]
        before = x.new_zeros(x.shape[0], kernel - 1, x.shape[2]) if state is None else state
        inputs = append(before, x, tokens.real)
        y = F.conv1d(inputs.transpose(1, 2), self.taps.flip(0).t()[:, None], self.bias, groups=x.shape[2])
        return y.transpose(1, 2), inputs[:, inputs.shape[1] - kernel + 1 :]


GATED = {"SwiGLU": F.silu, "GeGLU": lambda y: F.gelu(y, approximate="tanh"), "SGLU": lambda y: y}
PLAIN = {"GELU": F.gelu, "SquaredReLU": lambda y: F.relu(y).square()}


class MLP(nn.Module):
    """down(activation(up(x))), or with a gate down(activation(gate(x)) * up(x))."""

    def __init__(self, config, width):
        super().__init__()
        inner = config["hidden"] or max(1, round(config["expansion"] * width))
        self.kind = config["class"]
        self.up = nn.Linear(width, inner, bias=config["bias"])
        self.down = nn.Linear(inner, width, bias=config["bias"])
        self.gate = nn.Linear(width, inner, bias=config["bias"]) if self.kind in GATED else None

    def forward(self, x):
        if self.gate is None:
            return self.down(PLAIN[self.kind](self.up(x)))
        return self.down(GATED[self.kind](self.gate(x)) * self.up(x))


def split_heads(x, heads):
    """Returns (b, t, h, k) of (b, t, h k)."""
    return x.unflatten(-1, (heads, -1))
