"""Linear attention, with its feature maps. The state is the sum of phi(k) v^T, one more column of v being ones."""

import torch
from parts import RMSNorm, mixer, rotate, split_heads
from recurrence import recurrence, retnet_log_decays
from torch import nn
from torch.nn import functional as F


def taylor(x):
    """Returns phi with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(k)."""
    x = x * x.shape[-1] ** -0.25
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * 2**-0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)


class Hedgehog(nn.Module):
    """softmax([2 (W x + b), -2 (W x + b)]), W per head."""

    def __init__(self, heads, dim):
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.empty(heads, dim, dim)), nn.Parameter(torch.empty(heads, dim))

    def forward(self, x):
        y = 2 * (torch.einsum("bthk,hkl->bthl", x, self.kernel) + self.bias)
        return torch.cat([y, -y], -1).softmax(-1)


MAPS = {
    "Identity": lambda x, config: x * x.shape[-1] ** -0.25,
    "EluPlusOne": lambda x, config: F.elu(x) + 1,
    "Relu": lambda x, config: F.relu(x) + config["epsilon"],
    "Exp": lambda x, config: x.exp(),
    "Taylor": lambda x, config: taylor(x),
}


@mixer
class LinearAttention(nn.Module):
    """o_t = phi(q_t) S_t / (phi(q_t) . z_t + epsilon), S_t = gamma S_{t-1} + phi(k_t) v_t^T, z_t likewise of phi(k)."""

    def __init__(self, config, width, index):
        super().__init__()
        self.config, self.heads = config, config["heads"]
        dim = width // self.heads
        keys = config["feature_dim"] or dim
        self.query = nn.Linear(width, self.heads * keys, bias=False)
        self.key = nn.Linear(width, self.heads * keys, bias=False)
        self.value, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        if config["feature_map"]["class"] == "Hedgehog":
            self.query_features, self.key_features = Hedgehog(self.heads, keys), Hedgehog(self.heads, keys)
        self.output_norm = RMSNorm(dim) if config["output_norm"] else None

    def forward(self, x, tokens, state):
        q, k, v = (split_heads(linear(x), self.heads) for linear in (self.query, self.key, self.value))
        if self.config["positions"] is not None:
            q, k = (rotate(y, tokens.positions, self.config["positions"]) for y in (q, k))
        phi = self.config["feature_map"]
        if phi["class"] == "Hedgehog":
            q, k = self.query_features(q), self.key_features(k)
        else:
            q, k = MAPS[phi["class"]](q, phi), MAPS[phi["class"]](k, phi)
        k = k * tokens.real[..., None, None]
        if self.config["normalise"]:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        decay = None
        if self.config["decay"] == "retnet":
            decay = retnet_log_decays(self.heads, x) * tokens.real[..., None]
        o, state = recurrence(q, k, v, state, log_decay=None if decay is None else decay[..., None])
        if self.config["normalise"]:
            o = o[..., :-1] / (o[..., -1:] + self.config["epsilon"])
        if self.output_norm is not None:
            o = self.output_norm(o)
        return self.output(o.flatten(2)), state
