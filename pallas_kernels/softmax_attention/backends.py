"""What serves softmax attention on each backend, best first.

A library where one does: cuDNN on NVIDIA GPUs, jax's splash attention on TPUs (their modules say what they refuse); the
scheduled kernels for all
the rest: sinks on Hopper, any mask that is a rule, positions, log-sum-exps with gradients, the same bits every run.
"""

from __future__ import annotations

from typing import Any

from recollect.pallas_kernels.dispatch import Implementation, always
from recollect.pallas_kernels.scheduled_attention import gpu, tpu
from recollect.pallas_kernels.softmax_attention import cudnn, reference, scheduled, splash, xla

SCHEDULED: dict[str, Any] = {"gpu": gpu, "tpu": tpu}
"""Platform -> module of its scheduled kernels."""

FORMS: dict[str, Implementation] = {
    "cudnn": (cudnn.attention, cudnn.refuses),
    "pallas_gpu": scheduled.form(SCHEDULED["gpu"], "softmax_attention.gpu_tiles"),
    "splash": (splash.attention, splash.refuses),
    "pallas_tpu": scheduled.form(SCHEDULED["tpu"], "softmax_attention.tpu_tiles"),
    "xla": (xla.attention, always),
    "reference": (reference.attention, always),
}
