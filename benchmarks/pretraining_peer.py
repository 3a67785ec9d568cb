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
import statistics
import sys
import time

import torch
from torch import nn

from recollect.benchmarks.kernel_peers import flex, timed
from recollect.benchmarks.peer_side import serve

WARM_UP = 3


def measure(case: dict) -> dict:
    """Returns rates of a training step whose gradients are added up over `pieces`, and the seconds of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = build(case).to(device)
    settings = case["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        weight_decay=settings["weight_decay"],
        fused=device == "cuda",
    )
    run = torch.compile(model) if device == "cuda" else model
    rows, pieces, length = case["rows"], case["pieces"], case["length"]
    tokens = torch.randint(case["vocabulary"], (pieces, rows // pieces, length + 1), device=device)

    def step() -> None:
        for piece in tokens:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = run(piece[:, :-1], piece[:, 1:]) / pieces
            loss.backward()
        if settings["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range((WARM_UP if device == "cuda" else 1) + case["steps"]):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    seconds = seconds[-case["steps"] :]
    median, version = statistics.median(seconds), f"torch {torch.__version__}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "tokens_per_second": rows * length / median,
        "step_seconds": median,
        "seconds": seconds,
        "parameters": parameters,
        "version": f"fla {fla.__version__}, {version}" if (fla := sys.modules.get("fla")) else version,
    }


def build(case: dict):
    """Returns the model: (tokens, targets) -> mean cross-entropy."""
    width, hidden = case["width"], case["hidden"]

    def linear(inputs, outputs, bias=False):
        layer = nn.Linear(inputs, outputs, bias=bias)
        nn.init.normal_(layer.weight, std=0.02)
        return layer

    class Block(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.mixer = _MIXERS[layer["kind"]](layer, width, case["length"], linear)
            self.mixer_norm, self.mlp_norm = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
            self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

        def forward(self, x):
            x = x + self.mixer(self.mixer_norm(x))
            y = self.mlp_norm(x)
            return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(case["vocabulary"], width)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.blocks = nn.Sequential(*map(Block, case["layers"]))
            self.norm = nn.RMSNorm(width, 1e-6)
            self.fused = None
            if case["vocabulary"] >= 4096 and torch.cuda.is_available():
                from fla.modules import FusedLinearCrossEntropyLoss

                self.fused = FusedLinearCrossEntropyLoss()  # never holds all logits

        def forward(self, tokens, targets):
            x = self.norm(self.blocks(self.embedding(tokens)))
            if self.fused is not None:
                return self.fused(x.reshape(-1, width), targets.reshape(-1), self.embedding.weight.to(x.dtype))
            logits = nn.functional.linear(x, self.embedding.weight).float()
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    assert case["rows"] % case["pieces"] == 0
    return Model().to(torch.float32)


def _softmax(layer, width, length, linear):
    """Causal attention over everything or over the last `window` keys, rotary positions on a share of each head."""
    heads, window = layer["heads"], layer.get("window")
    dim = width // heads
    turned = int(dim * layer.get("rotary", 0.0)) // 2 * 2

    class Softmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.output = (linear(width, width) for _ in range(4))
            angles = torch.outer(
                torch.arange(length).float(), 10_000.0 ** (-torch.arange(0, turned, 2).float() / max(turned, 1))
            )
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
            self.attend = flex(torch, length, window) if window is not None and torch.cuda.is_available() else None

        def turn(self, x):
            a, b, rest = x[..., : turned // 2], x[..., turned // 2 : turned], x[..., turned:]
            cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (part(x).view(b, t, heads, dim).transpose(1, 2) for part in (self.query, self.key, self.value))
            if turned:
                q, k = self.turn(q), self.turn(k)
            if window is None:
                o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            elif self.attend is not None:
                o = self.attend(q, k, v)
            else:
                apart = torch.arange(t)[:, None] - torch.arange(t)[None]
                o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(apart >= 0) & (apart < window))
            return self.output(o.transpose(1, 2).reshape(b, t, width))

    return Softmax()


def _convolution(layer, width, length, linear):
    """Based's gated convolution: W_out (silu(conv(u1)) * u2)."""
    inner = layer["expansion"] * width // 2

    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.output = linear(width, 2 * inner, bias=True), linear(inner, width, bias=True)
            self.taps = nn.Conv1d(inner, inner, layer["kernel"], padding=layer["kernel"] - 1, groups=inner, bias=False)

        def forward(self, x):
            u, gate = self.input(x).chunk(2, dim=-1)
            y = self.taps(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            return self.output(nn.functional.silu(y) * gate)

    return Convolution()


def _taylor(layer, width, length, linear):
    """Based's linear attention by fla, normalised; on a CPU by all pairs."""
    heads, features = layer["heads"], layer["feature_dim"]

    class Taylor(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = linear(width, heads * features), linear(width, heads * features)
            self.value, self.output = linear(width, width), linear(width, width)
            self.form = _based(features, width // heads, heads, length) if torch.cuda.is_available() else None

        def forward(self, x):
            b, t, _ = x.shape
            q, k = (part(x).view(b, t, heads, features) for part in (self.query, self.key))
            v = self.value(x).view(b, t, heads, width // heads)
            if self.form is not None:
                o = self.form(q, k, v)
            else:
                s = torch.einsum("bihk,bjhk->bhij", q, k) / features**0.5
                weights = (1 + s + s * s / 2).tril()
                o = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v)
            return self.output(o.reshape(b, t, width))

    return Taylor()


@functools.cache
def _based(features, values, heads, length):
    """Returns the faster of fla's two forms with gradients at this shape: the square one, and the one with a state."""
    from fla.ops.based import fused_chunk_based, parallel_based

    inputs = [
        torch.randn(4, length, heads, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for d in (features, features, values)
    ]
    forms = [functools.partial(form, use_norm=True) for form in (parallel_based, fused_chunk_based)]
    return torch.compiler.disable(min(forms, key=lambda form: timed(torch, lambda: form(*inputs).sum().backward())))


_MIXERS = {"attention": _softmax, "window": _softmax, "convolution": _convolution, "taylor": _taylor}

if __name__ == "__main__":
    serve(measure)
