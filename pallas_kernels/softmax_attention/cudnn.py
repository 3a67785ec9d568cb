"""cuDNN's flash attention, through jax.nn: causal or windowed self-attention of whole sequences in bf16 or fp16, on
NVIDIA GPUs.

What it does not do, read in the sources of jax 0.10.2 and 0.11.2 (jax/_src/cudnn/fused_attention_stablehlo.py) and of
XLA:

- jax hands cuDNN the length of the window and whether the mask is causal; without the latter cuDNN also attends to what
  comes after (jax pull request 39576). Hence is_causal=True, always. A window of w keys is local_window_size=(w - 1,
  0), as jax counts those before.
- The log-sum-exp can be had, rounded to the inputs' dtype, but its cotangent is dropped on the way back: it is refused.
- Sinks and masks would have to be biases of (t, s) numbers, which cost more than they save; documents packed in a row
  need their lengths on the host, or jax's private interface: refused.
- The backward pass sums dq in no fixed order. XLA asks cuDNN for the deterministic algorithm when it is set to be
  deterministic as a whole (RequireDeterminism in xla/service/gpu/stream_executor_util.cc, used by
  transforms/cudnn_custom_call_compiler.cc): by the flag --xla_gpu_deterministic_ops, which also makes scatters serial,
  or --xla_gpu_exclude_nondeterministic_ops, which refuses programs that hold other operations without a deterministic
  variant. There is no switch for one call, so `deterministic` is refused unless XLA_FLAGS has either.

Without a GPU only the call itself can be looked at: XLA builds cuDNN's graph on the device, and compiling ahead of time
leaves it out. What cuDNN makes of it, `python main.py bench kernels` compares with the reference before it times
anything.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.accelerators import is_hopper
from recollect.pallas_kernels.sharding import over_mesh

DETERMINISTIC_FLAGS = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")

LARGEST_HEAD, LARGEST_HEAD_BEFORE_HOPPER = 256, 128

FEWEST_TOKENS = 128
"""Below, cuDNN's tiles would be mostly padding, and a launch takes longer than the work."""


def softmax_attention(q, k, v, *, window, scale, **rest) -> tuple[jax.Array, None]:
    """Returns the output and no log-sum-exp; arguments as those of the public function."""
    window_size = None if window is None or window >= q.shape[1] else (window - 1, 0)

    def run(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, scale=float(scale), is_causal=True, local_window_size=window_size, implementation="cudnn"
        )

    return over_mesh(run, {"q": "b t h k", "k": "b s h k", "v": "b s h k"}, "b t h k")(q, k, v), None


def refuses(
    q,
    k,
    v,
    *,
    window,
    mask,
    sinks,
    bias,
    dropout,
    query_positions,
    key_positions,
    query_segments,
    key_segments,
    return_lse,
    deterministic,
    **rest,
) -> str | None:
    """Returns why it cannot serve a call, or None."""
    if mask is not None:
        return "it takes no masks"
    if sinks is not None:
        return "it has no sinks"
    if bias is not None:
        return "it takes no bias of scores"
    if dropout is not None:
        return "it takes no dropout of weights"
    if q.shape[1] != k.shape[1] or query_positions is not key_positions:
        return "it attends within one sequence only"
    if query_segments is not None or key_segments is not None:
        return "it takes one document a row: segments are not served"
    if window is not None and query_positions is not None:
        return "it counts windows in stored tokens, not in positions"
    if return_lse:
        return "its log-sum-exp has no gradient"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16; got {q.dtype}, {k.dtype}, {v.dtype}"
    most = LARGEST_HEAD if is_hopper(dispatch.device().kind) else LARGEST_HEAD_BEFORE_HOPPER
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > most:
        return f"it takes keys and values of one size, a multiple of 8 to {most}; got {q.shape[3]} and {v.shape[3]}"
    if q.shape[1] < FEWEST_TOKENS:
        return f"it takes at least {FEWEST_TOKENS} tokens; got {q.shape[1]}"
    if deterministic and not is_deterministic():
        return f"its gradients may differ from run to run, unless XLA_FLAGS has {DETERMINISTIC_FLAGS[0]}=true"
    return None


def is_deterministic() -> bool:
    """Returns whether XLA_FLAGS makes XLA ask cuDNN for its deterministic algorithm."""
    flags = dict(flag.partition("=")[::2] for flag in os.environ.get("XLA_FLAGS", "").split())
    return any(flags.get(flag, "false").lower() in ("", "true", "1") for flag in DETERMINISTIC_FLAGS)
