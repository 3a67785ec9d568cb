"""Times the peers of `bench kernels` in a process of its own: flash-linear-attention's Triton kernels and torch, on the
GPU.

    PYTHON benchmarks/kernel_peers.py < cases.jsonl

Reads one JSON line a case ({"peer", "sizes"}) and answers one a case: {"forward", "both", "version"} in seconds, with
"backward_error" in place of "both" where only the forward pass works, or {"error"} with the reason there is nothing.
"broken" is in an answer after which this process is of no more use. Of this project only peer_side.py is
imported, so any interpreter with torch and fla serves.

fla's functions take (b, t, h, d) and fp32 gates, as they are called in its own benchmarks. torch's attention takes
heads before tokens, and is given
arrays laid out so: scaled_dot_product_attention where it is causal, flex_attention for windows and sinks.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time

from recollect.benchmarks.peer_side import one_line, serve


def main() -> None:
    """Answers cases until there are no more."""
    serve(answer)


def answer(case: dict) -> dict:
    """Returns a case's times or error, and "broken" where the GPU is of no more use to this process."""
    try:
        times = measure(case)
    except Exception as error:  # whatever a peer's library raises is an answer here
        times = {"error": one_line(error)}
    try:
        _free()
    except Exception:  # after a fault on the GPU every further call fails
        times["broken"] = True
    return times


def _free() -> None:
    """Gives memory that no tensor uses any more back to the GPU, for the process beside this one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure(case: dict) -> dict:
    """Medians of a case's forward pass and of forward and backward."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    torch.manual_seed(0)
    function, inputs, version = PEERS[case["peer"]](**case["sizes"])

    def forward():
        with torch.no_grad():
            return function(*inputs)

    leaves = [x.detach().requires_grad_() for x in inputs]
    cotangent = torch.randn_like(forward())

    def both():
        return torch.autograd.grad(function(*leaves), leaves, cotangent)

    answer = {"forward": timed(forward, torch), "version": version}
    try:
        answer["both"] = timed(both, torch)
    except Exception as error:
        answer["backward_error"] = one_line(error)
    return answer


def timed(call, torch) -> float:
    """Median seconds a call, each of 20 turns long enough to hide a launch."""
    for _ in range(5):  # compiles and tunes
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    calls = max(1, int(0.01 / max(time.perf_counter() - start, 1e-5)))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _rows(b, t, h, k, v):
    import torch

    make = lambda d: torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, key, value = make(k), torch.nn.functional.normalize(make(k), dim=-1), make(v)
    return q, key, value


def _gate(*shape):
    import torch

    return torch.nn.functional.logsigmoid(torch.randn(*shape, device="cuda") + 3)


def _beta(b, t, h):
    import torch

    return torch.sigmoid(torch.randn(b, t, h, device="cuda", dtype=torch.bfloat16))


def _version() -> str:
    import fla
    import torch

    return f"fla {fla.__version__}, torch {torch.__version__}"


def linear_attention(b, t, h, k, v):
    from fla.ops.linear_attn import chunk_linear_attn

    return (lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0]), _rows(b, t, h, k, v), _version()


def simple_gla(b, t, h, k, v):
    from fla.ops.simple_gla import chunk_simple_gla

    return (lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g)[0]), (*_rows(b, t, h, k, v), _gate(b, t, h)), _version()


def gla(b, t, h, k, v):
    from fla.ops.gla import chunk_gla

    return (lambda q, k, v, g: chunk_gla(q, k, v, g=g)[0]), (*_rows(b, t, h, k, v), _gate(b, t, h, k)), _version()


def gated_delta_rule(b, t, h, k, v):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    inputs = (*_rows(b, t, h, k, v), _gate(b, t, h), _beta(b, t, h))
    return (lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]), inputs, _version()


def kda(b, t, h, k, v):
    from fla.ops.kda import chunk_kda

    inputs = (*_rows(b, t, h, k, v), _gate(b, t, h, k), _beta(b, t, h))
    return (lambda q, k, v, g, beta: chunk_kda(q, k, v, g=g, beta=beta)[0]), inputs, _version()


def based(b, t, h, k, v):
    """The faster of fla's two forms at this length: the square one, and the one that carries a state."""
    import torch
    from fla.ops.based import fused_chunk_based, parallel_based

    inputs = _rows(b, t, h, k, v)
    forms = [
        lambda q, k, v: parallel_based(q, k, v, use_norm=True),
        lambda q, k, v: fused_chunk_based(q, k, v, use_norm=True),
    ]
    with torch.no_grad():
        times = [timed(lambda form=form: form(*inputs), torch) for form in forms]
    return forms[times.index(min(times))], inputs, _version()


def short_conv(b, t, d):
    import torch

    x, gate = (torch.randn(b, t, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    taps = torch.randn(d, 1, 4, device="cuda", dtype=torch.bfloat16)

    @torch.compile
    def function(x, gate, taps):
        y = torch.nn.functional.conv1d(x.transpose(1, 2), taps, padding=3, groups=d)[..., :t].transpose(1, 2)
        return torch.nn.functional.silu(y) * gate

    return function, (x, gate, taps), f"torch {torch.__version__}"


def _heads_first(b, t, h, k, v, g=None):
    """q (b, h, t, k), k (b, g, t, k), v (b, g, t, v), as torch's attention takes them."""
    import torch

    make = lambda heads, d: torch.randn(b, heads, t, d, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    groups = h if g is None else g
    return make(h, k), make(groups, k), make(groups, v)


def causal_attention(b, t, h, k, v, g=None):
    """torch's own choice of kernel (FlashAttention or cuDNN)."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    return (
        (lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=g is not None)),
        _heads_first(b, t, h, k, v, g),
        _torch(),
    )


def sliding_attention(b, t, h, k, v, w, g=None):
    """flex_attention, compiled, with a block mask of the window."""
    attend = _flex(t, w)
    return (
        (lambda q, k, v: attend(q, k, v, enable_gqa=g is not None)),
        _heads_first(b, t, h, k, v, g),
        f"flex_attention, {_torch()}",
    )


def sink_attention(b, t, h, k, v, w, g=None):
    """The same, and a logit a head that joins the denominator: outputs shrink by the sigmoid of the log-sum-exp less
    the logit."""
    import torch
    from torch.nn.attention.flex_attention import AuxRequest

    attend = _flex(t, w)

    def function(q, k, v, sinks):
        o, more = attend(q, k, v, enable_gqa=g is not None, return_aux=AuxRequest(lse=True))
        return (o * torch.sigmoid(more.lse - sinks[:, None])[..., None]).to(o.dtype)

    inputs = (*_heads_first(b, t, h, k, v, g), torch.randn(h, device="cuda"))
    return torch.compile(function), inputs, f"flex_attention, {_torch()}"


def gated_heads(b, t, h, k, v, a):
    """What public mixtures of heads do: every head's attention, multiplied by gates of which all but `a` a token are
    zero."""
    import torch

    attend, attended = causal_attention(b, t, h, k, v)[0], _heads_first(b, t, h, k, v)

    def function(q, k, v, router):
        probabilities, chosen = router.softmax(dim=1).topk(a, dim=1)
        gates = torch.zeros_like(router).scatter(1, chosen, h * probabilities)
        return (attend(q, k, v) * gates[..., None]).to(q.dtype)

    return function, (*attended, torch.randn(b, h, t, device="cuda")), _torch()


def _flex(t, w):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < w), None, None, t, t, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v, **options: compiled(q, k, v, block_mask=seen, **options)


def _torch() -> str:
    import torch

    return f"torch {torch.__version__}"


LINEAR = (linear_attention, simple_gla, gla, gated_delta_rule, kda, based, short_conv)
SOFTMAX = (causal_attention, sliding_attention, sink_attention, gated_heads)
PEERS = {peer.__name__: peer for peer in (*LINEAR, *SOFTMAX)}

if __name__ == "__main__":
    main()
