"""Softmax attention, windows, gated attention and mixtures of heads. The state is keys, values, positions and which are
real; windows keep what they can still see."""

import torch
from parts import RMSNorm, append, mixer, rotate, split_heads
from torch import nn


@mixer
class Attention(nn.Module):
    """o_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(k)) v_j per head, y = [o_1 ... o_h] W_o."""

    def __init__(self, config, width, index):
        super().__init__()
        self.config = config
        self.heads, self.key_heads = config["heads"], config["key_heads"] or config["heads"]
        self.head_dim = config["head_dim"] or width // self.heads
        outer, inner, bias = self.heads * self.head_dim, self.key_heads * self.head_dim, config["bias"]
        self.query = nn.Linear(width, outer, bias=bias)
        self.key, self.value = nn.Linear(width, inner, bias=bias), nn.Linear(width, inner, bias=bias)
        self.output = nn.Linear(outer, width, bias=bias)
        if config["query_key_norm"]:
            self.query_norm, self.key_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)

    def project(self, x):
        """Returns queries, keys and values, neither rotated."""
        q = split_heads(self.query(x), self.heads)
        k, v = split_heads(self.key(x), self.key_heads), split_heads(self.value(x), self.key_heads)
        return (self.query_norm(q), self.key_norm(k), v) if self.config["query_key_norm"] else (q, k, v)

    def rotated(self, x, positions):
        """Returns x (..., h, k) rotated by positions (...), where the mixer has rotary ones."""
        return x if self.config["positions"] is None else rotate(x, positions, self.config["positions"])

    def forward(self, x, tokens, state):
        q, k, v = self.project(x)
        q, k = self.rotated(q, tokens.positions), self.rotated(k, tokens.positions)
        new = {"k": k, "v": v, "positions": tokens.positions, "real": tokens.real}
        kept = new if state is None else {name: append(state[name], new[name], tokens.real) for name in new}
        repeats = self.heads // self.key_heads
        keys, values = (kept[name].repeat_interleave(repeats, 2) for name in ("k", "v"))
        scores = torch.einsum("bthk,bshk->bhts", q, keys) * self.head_dim**-0.5
        seen = self.seen(tokens.positions[:, :, None], kept["positions"][:, None]) & kept["real"][:, None]
        scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
        o = torch.einsum("bhts,bshv->bthv", self.weights(scores), values)
        return self.output(self.weighted(o, q, x).flatten(2)), self.keep(kept)

    def seen(self, queries, keys):
        """Returns which keys a query sees, by positions."""
        return keys <= queries

    def weights(self, scores):
        """Returns the weights of scores (b, h, t, s)."""
        return scores.softmax(-1)

    def weighted(self, o, q, x):
        """Returns heads' outputs (b, t, h, v) as the last projection takes them."""
        return o

    def keep(self, state):
        """Returns what later tokens may see."""
        return state


@mixer
class SlidingWindow(Attention):
    """Attention to the last `window` tokens; with sinks "first" also to the first ones, with "learned" each head has a
    logit more in the denominator."""

    def __init__(self, config, width, index):
        super().__init__(config, width, index)
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config["sinks"] == "learned" else None
        self.first = config["first"] if config["sinks"] == "first" else 0

    def seen(self, queries, keys):
        return (keys <= queries) & ((keys > queries - self.config["window"]) | (keys < self.first))

    def weights(self, scores):
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks[:, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def keep(self, state):
        # Tokens of a row are real from some place on, so the last ones are the nearest.
        if self.first:
            return state
        window = max(self.config["window"], 1)
        return {name: value[:, -window:] for name, value in state.items()}


@mixer
class GatedAttention(Attention):
    """Attention whose heads' outputs pass a gate of the input, sigmoid(x W), per channel or per head."""

    def __init__(self, config, width, index):
        super().__init__(config, width, index)
        channels = self.heads * (self.head_dim if config["gate"] == "channel" else 1)
        self.gate = nn.ModuleDict({"projection": nn.Linear(width, channels, bias=False)})

    def weighted(self, o, q, x):
        return o * split_heads(self.gate["projection"](x).sigmoid(), self.heads)


@mixer
class MixtureOfHeads(Attention):
    """Attention whose heads are weighted per token: `shared` ones always, of the others the `active` likeliest."""

    def __init__(self, config, width, index):
        super().__init__(config, width, index)
        self.shared, self.routed = config["shared"], config["heads"] - config["shared"]
        learned = config["gates"] != "ones"
        sizes = {"routed_router": self.routed, "shared_router": self.shared if self.shared > 1 else 0}
        sizes["kind_router"] = 2 if self.shared and self.routed else 0
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(width, size, bias=False) if learned and size else None)

    def weighted(self, o, q, x):
        averages_one = self.config["gates"] == "code"
        shared = x.new_ones(*x.shape[:2], self.shared)
        routed = x.new_zeros(*x.shape[:2], self.routed)
        if self.shared_router is not None:
            shared = self.shared_router(x).softmax(-1) * (self.shared if averages_one else 1)
        if self.routed:
            logits = self.norms(q) if self.routed_router is None else self.routed_router(x)
            places = logits.topk(self.config["active"], -1).indices
            chosen = torch.zeros_like(logits).scatter(-1, places, 1.0)
            routed = chosen if self.config["gates"] == "ones" else chosen * logits.softmax(-1)
            if averages_one:
                total = routed.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
                routed = self.config["active"] * routed / total
        if self.kind_router is not None:
            kinds = self.kind_router(x).softmax(-1) * (2 if averages_one else 1)
            shared, routed = kinds[..., :1] * shared, kinds[..., 1:] * routed
        return o * torch.cat([shared, routed], -1)[..., None]

    def norms(self, q):
        """Returns the norms of the routed heads' queries, by which heads without routers are ranked."""
        return q[:, :, self.shared :].square().sum(-1).add(1e-12).sqrt()
