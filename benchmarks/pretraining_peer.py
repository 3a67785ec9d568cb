"""Trains the peer of `bench pretraining` in a process of its own: a torch model of the same layers and sizes, with
flash-linear-attention's kernels.

    PYTHON benchmarks/pretraining_peer.py < case.json

Reads one JSON object (layers, sizes, optimizer, "steps") and answers {"tokens_per_second", "step_seconds", "seconds",
"parameters", "version"}, or {"error"} with the reason. Of this project only files are imported that need no
more than the standard library, so any interpreter with torch serves; Taylor layers need fla.

Written as a user of torch would: parameters fp32 under bfloat16 autocast, torch.compile, scaled_dot_product_attention
(FlashAttention or cuDNN) for full attention, compiled flex_attention for windows, fla's parallel_based or
fused_chunk_based (whichever is faster here) for Taylor layers, fla's fused linear cross-entropy for vocabularies of
4,096 and more, fused AdamW, clipping. On a CPU it runs in fp32 without compiling, to check shapes and parameter counts.
"""

import functools
import importlib
import statistics
import sys
import time

import torch
from torch import nn

from recollect.benchmarks import kernel_peers, peer_side

WARM_UP = 3
ON_GPU = torch.cuda.is_available()


def measure(case: dict) -> dict:
    """Returns rates of a training step whose gradients are added up over `pieces`, and the seconds of each."""
    device = "cuda" if ON_GPU else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    rows, pieces, length, settings = case["rows"], case["pieces"], case["length"], case["optimizer"]
    assert rows % pieces == 0
    model = Model(case).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        weight_decay=settings["weight_decay"],
        fused=ON_GPU,
    )
    run = torch.compile(model) if ON_GPU else model
    tokens = torch.randint(case["vocabulary"], (pieces, rows // pieces, length + 1), device=device)
    seconds = []
    for _ in range((WARM_UP if ON_GPU else 1) + case["steps"]):
        begun = time.perf_counter()
        for piece in tokens:
            with torch.autocast(device, torch.bfloat16, enabled=ON_GPU):
                loss = run(piece[:, :-1], piece[:, 1:]) / pieces
            loss.backward()
        if settings["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ON_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    seconds = seconds[-case["steps"] :]
    median, version = statistics.median(seconds), f"torch {torch.__version__}"
    return {
        "tokens_per_second": rows * length / median,
        "step_seconds": median,
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "version": f"fla {fla.__version__}, {version}" if (fla := sys.modules.get("fla")) else version,
    }


class Model(nn.Module):
    """(tokens, targets) -> mean cross-entropy."""

    def __init__(self, case):
        super().__init__()
        self.embedding = nn.Embedding(case["vocabulary"], case["width"])
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(layer, case) for layer in case["layers"]))
        self.norm = nn.RMSNorm(case["width"], 1e-6)
        fused = case["vocabulary"] >= 4096 and ON_GPU  # a loss that never holds all logits
        self.fused = importlib.import_module("fla.modules").FusedLinearCrossEntropyLoss() if fused else None

    def forward(self, tokens, targets):
        x, weight = self.norm(self.blocks(self.embedding(tokens))), self.embedding.weight
        if self.fused is not None:
            return self.fused(x.flatten(0, 1), targets.reshape(-1), weight.to(x.dtype))
        logits = nn.functional.linear(x, weight).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """A mixer and an MLP, each behind its norm."""

    def __init__(self, layer, case):
        super().__init__()
        width, hidden = case["width"], case["hidden"]
        self.mixer = MIXERS[layer["kind"]](layer, width, case["length"])
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def forward(self, x):
        x = x + self.mixer(self.mixer_norm(x))
        y = self.mlp_norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Heads(nn.Module):
    """Queries and keys of `features` per head, values, what a subclass's `attend` makes of them, and the output."""

    def __init__(self, heads, features, width):
        super().__init__()
        self.heads = heads
        self.query, self.key = linear(width, heads * features), linear(width, heads * features)
        self.value, self.output = linear(width, width), linear(width, width)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        return self.output(self.attend(q, k, v).flatten(-2))


class Softmax(Heads):
    """Causal attention over everything or over the last `window` keys, rotary positions on a share of each head."""

    def __init__(self, layer, width, length):
        dim = width // layer["heads"]
        super().__init__(layer["heads"], dim, width)
        self.window = layer.get("window")
        self.turned = int(dim * layer.get("rotary", 0.0)) // 2 * 2
        rates = 10_000.0 ** (-torch.arange(0, self.turned, 2).float() / max(self.turned, 1))
        angles = torch.outer(torch.arange(length).float(), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.windowed = kernel_peers.flex(torch, length, self.window) if self.window is not None and ON_GPU else None

    def turn(self, x):
        a, b, rest = x.split([self.turned // 2, self.turned // 2, x.shape[-1] - self.turned], dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def attend(self, *qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv)
        if self.turned:
            q, k = self.turn(q), self.turn(k)
        if self.window is None:
            o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.windowed is not None:
            o = self.windowed(q, k, v)
        else:
            places = torch.arange(q.shape[2])
            apart = places[:, None] - places
            o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(apart >= 0) & (apart < self.window))
        return o.transpose(1, 2)


class Taylor(Heads):
    """Based's linear attention by fla, normalised; on a CPU by all pairs."""

    def __init__(self, layer, width, length):
        heads, features = layer["heads"], layer["feature_dim"]
        super().__init__(heads, features, width)
        self.form = _based(features, width // heads, heads, length) if ON_GPU else None

    def attend(self, q, k, v):
        if self.form is not None:
            return self.form(q, k, v)
        s = torch.einsum("bihk,bjhk->bhij", q, k) / q.shape[-1] ** 0.5
        weights = (1 + s + s * s / 2).tril()
        return torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v)


@functools.cache
def _based(features, values, heads, length):
    """Returns fla's Based in the form that is faster with gradients at this shape."""
    inputs = [
        torch.randn(4, length, heads, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for d in (features, features, values)
    ]
    return torch.compiler.disable(kernel_peers.faster_based(torch, lambda form: form(*inputs).sum().backward()))


class Convolution(nn.Module):
    """Based's gated convolution: W_out (silu(conv(u1)) * u2)."""

    def __init__(self, layer, width, length):
        super().__init__()
        inner, kernel = layer["expansion"] * width // 2, layer["kernel"]
        self.input, self.output = linear(width, 2 * inner, bias=True), linear(inner, width, bias=True)
        self.taps = nn.Conv1d(inner, inner, kernel, padding=kernel - 1, groups=inner, bias=False)

    def forward(self, x):
        u, gate = self.input(x).chunk(2, dim=-1)
        y = self.taps(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.output(nn.functional.silu(y) * gate)


def linear(inputs, outputs, bias=False):
    """Returns a linear map as this project initialises them."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


MIXERS = {"attention": Softmax, "window": Softmax, "convolution": Convolution, "taylor": Taylor}

if __name__ == "__main__":
    peer_side.serve(measure)
