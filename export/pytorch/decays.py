"""States that decay: gated linear attention, retention, Mamba-2."""

import torch
from parts import mixer, rotate, split_heads
from recurrence import Gate, HeadNorm, LowRank, Recurrent, StepDecay, retnet_log_decays
from torch import nn
from torch.nn import functional as F


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
