"""Delta rules: DeltaNet, Gated DeltaNet, KDA."""

import torch
from parts import mixer
from recurrence import Gate, HeadNorm, LowRank, Recurrent, StepDecay
from torch import nn


def unit(x):
    """Returns x / sqrt(sum x^2 + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


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
