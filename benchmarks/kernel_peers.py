"""Times the peers of `bench kernels` in a process of its own: flash-linear-attention's Triton kernels and torch, on the
GPU.

    PYTHON benchmarks/kernel_peers.py < cases.jsonl

Reads one JSON line per case ({"peer", "sizes"}) and answers one per case: {"forward", "both", "version"} in seconds,
with "backward_error" in place of "both" where only the forward pass works, or {"error"} with the reason.
"broken" is in an answer after which this process is of no more use. Of this project only peer_side.py
is imported, so any interpreter with torch and fla serves.

fla's functions take (b, t, h, d) and fp32 gates, as they are called in its own benchmarks. torch's attention takes
heads before tokens, and is given arrays laid out so: scaled_dot_product_attention where it is causal, flex_attention
for windows and sinks.
"""

import functools
import gc
import importlib
import sys

from recollect.benchmarks import peer_side


def answer(case: dict) -> dict:
    """Returns a case's times or error, and "broken" where the GPU is of no more use to this process."""
    try:
        times = measure(case)
    except Exception as error:  # whatever a peer's library raises is an answer here
        times = {"error": peer_side.one_line(error)}
    try:  # memory that no tensor uses any more goes back to the GPU, for the process beside this one
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:  # after a fault on the GPU every further call fails
        times["broken"] = True
    return times


def measure(case: dict) -> dict:
    """Returns the medians of a case's forward pass and of forward and backward."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    torch.manual_seed(0)
    function, inputs, version = PEERS[case["peer"]](torch, **case["sizes"])

    def forward():
        with torch.no_grad():
            return function(*inputs)

    leaves = [x.detach().requires_grad_() for x in inputs]
    cotangent = torch.randn_like(forward())
    answer = {"forward": timed(torch, forward), "version": version}
    try:
        answer["both"] = timed(torch, lambda: torch.autograd.grad(function(*leaves), leaves, cotangent))
    except Exception as error:
        answer["backward_error"] = peer_side.one_line(error)
    return answer


def timed(torch, call) -> float:
    """Returns the median seconds per call."""
    return peer_side.timed(call, lambda _: torch.cuda.synchronize(), warm_up=5)[0]


def linear(torch, b, t, h, k, v, *, operation, name, decay=(), beta=False, **options):
    """Returns fla.ops.`operation`.`name`, its inputs and its version.

    Args:
      decay: dimensions of the log decay "g"; () for none. beta: whether it takes strengths per token and head.
    """
    call = getattr(importlib.import_module(f"fla.ops.{operation}"), name)
    sizes, gates = {"b": b, "t": t, "h": h, "k": k}, {}
    if decay:
        gates["g"] = torch.nn.functional.logsigmoid(torch.randn(*map(sizes.get, decay), device="cuda") + 3)
    if beta:
        gates["beta"] = torch.sigmoid(_bf16(torch, b, t, h))

    def function(q, k, v, *values):
        return call(q, k, v, **dict(zip(gates, values, strict=True)), **options)[0]

    return function, (*_qkv(torch, b, t, h, k, v), *gates.values()), _fla(torch)


def based(torch, b, t, h, k, v):
    """Returns fla's Based, in the form whose forward pass is faster at this length."""
    inputs = _qkv(torch, b, t, h, k, v)
    with torch.no_grad():
        return faster_based(torch, lambda form: form(*inputs)), inputs, _fla(torch)


def faster_based(torch, call):
    """Returns the one of fla's two forms of Based that `call(form)` is faster with: the square one, or the one with a
    state."""
    based = importlib.import_module("fla.ops.based")
    forms = [functools.partial(form, use_norm=True) for form in (based.parallel_based, based.fused_chunk_based)]
    return min(forms, key=lambda form: timed(torch, lambda: call(form)))


def short_conv(torch, b, t, d):
    """Returns a causal convolution of 4 taps per channel, silu and gate, compiled."""

    @torch.compile
    def function(x, gate, taps):
        y = torch.nn.functional.conv1d(x.transpose(1, 2), taps, padding=3, groups=d)[..., :t].transpose(1, 2)
        return torch.nn.functional.silu(y) * gate

    inputs = _bf16(torch, b, t, d), _bf16(torch, b, t, d), _bf16(torch, d, 1, 4)
    return function, inputs, f"torch {torch.__version__}"


def causal_attention(torch, b, t, h, k, v, g=None):
    """Returns torch's own choice of kernel (FlashAttention or cuDNN)."""
    attend = torch.nn.functional.scaled_dot_product_attention
    function = functools.partial(attend, is_causal=True, enable_gqa=g is not None)
    return function, _heads_first(torch, b, t, h, k, v, g), f"torch {torch.__version__}"


def sliding_attention(torch, b, t, h, k, v, w, g=None):
    """Returns flex_attention, compiled, with a block mask of the window."""
    function = functools.partial(flex(torch, t, w), enable_gqa=g is not None)
    return function, _heads_first(torch, b, t, h, k, v, g), f"flex_attention, torch {torch.__version__}"


def sink_attention(torch, b, t, h, k, v, w, g=None):
    """Returns the same with a logit per head that joins the denominator: outputs shrink by the sigmoid of the
    log-sum-exp less the logit."""
    from torch.nn.attention.flex_attention import AuxRequest

    attend, inputs, version = sliding_attention(torch, b, t, h, k, v, w, g)

    @torch.compile
    def function(q, k, v, sinks):
        o, auxiliary = attend(q, k, v, return_aux=AuxRequest(lse=True))
        return (o * torch.sigmoid(auxiliary.lse - sinks[:, None])[..., None]).to(o.dtype)

    return function, (*inputs, torch.randn(h, device="cuda")), version


def gated_heads(torch, b, t, h, k, v, a):
    """Returns what public mixtures of heads do: every head's attention, multiplied by gates of which all but `a` per
    token are zero."""
    attend, inputs, version = causal_attention(torch, b, t, h, k, v)

    def function(q, k, v, router):
        probabilities, chosen = router.softmax(dim=1).topk(a, dim=1)
        gates = torch.zeros_like(router).scatter(1, chosen, h * probabilities)
        return (attend(q, k, v) * gates[..., None]).to(q.dtype)

    return function, (*inputs, torch.randn(b, h, t, device="cuda")), version


def flex(torch, t, w):
    """Returns compiled flex_attention of t tokens that see the last w."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < w), None, None, t, t, device="cuda")
    return functools.partial(torch.compile(flex_attention), block_mask=mask)


def _bf16(torch, *shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _qkv(torch, b, t, h, k, v):
    key = torch.nn.functional.normalize(_bf16(torch, b, t, h, k), dim=-1)
    return _bf16(torch, b, t, h, k), key, _bf16(torch, b, t, h, v)


def _heads_first(torch, b, t, h, k, v, g=None):
    """Returns q (b, h, t, k), k (b, g, t, k), v (b, g, t, v), as torch's attention takes them."""
    return _bf16(torch, b, h, t, k), _bf16(torch, b, g or h, t, k), _bf16(torch, b, g or h, t, v)


def _fla(torch) -> str:
    return f"fla {importlib.import_module('fla').__version__}, torch {torch.__version__}"


LINEAR = {
    "linear_attention": {"operation": "linear_attn", "name": "chunk_linear_attn", "normalize": False},
    "simple_gla": {"operation": "simple_gla", "name": "chunk_simple_gla", "decay": "bth"},
    "gla": {"operation": "gla", "name": "chunk_gla", "decay": "bthk"},
    "gated_delta_rule": {
        "operation": "gated_delta_rule",
        "name": "chunk_gated_delta_rule",
        "decay": "bth",
        "beta": True,
    },
    "kda": {"operation": "kda", "name": "chunk_kda", "decay": "bthk", "beta": True},
}
OTHERS = (based, short_conv, causal_attention, sliding_attention, sink_attention, gated_heads)
PEERS = {
    **{name: functools.partial(linear, **facts) for name, facts in LINEAR.items()},
    **{peer.__name__: peer for peer in OTHERS},
}

if __name__ == "__main__":
    peer_side.serve(answer)
