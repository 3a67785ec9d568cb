"""Times that were predicted before any kernel had run on a GPU, from compiled programs and published numbers, and why each was off.

Predicted on 2026-11-26 for an H100 at 3.0 TB/s of copying, bf16, of the kernels as they were then (commit 1a41889). `why` was written after the
first measurement. Where a kernel has been replaced since, the row of the first measurement is the one that answers.
"""

from __future__ import annotations

import dataclasses

WIDE, LONG, NARROW = "b4 t4096 h64 k128 v128", "b2 t16384 h16 k128 v128", "b8 t2048 h32 k64 v64"
HEADS = "b4 t4096 h16 k128 v128"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """what: a case's name. low, high: milliseconds. part: "forward", or "both" with the gradients. why: of what was measured."""

    what: str
    part: str
    low: float
    high: float
    why: str
    form: str = "pallas_gpu"
    note: str = ""


PREDICTIONS = (
    Prediction(
        f"linear_recurrence, no decay, {WIDE}", "forward", 0.40, 0.55, "barriers and waits of one warpgroup cost more than reckoned"
    ),
    Prediction(f"linear_recurrence, no decay, {WIDE}", "both", 1.8, 2.7, "bytes set the time, as predicted"),
    Prediction(f"linear_recurrence, decay a head, {WIDE}", "forward", 0.40, 0.55, "as without decay"),
    Prediction(f"linear_recurrence, decay a head, {WIDE}", "both", 1.8, 2.7, "checkpoints and row sums come on top"),
    Prediction(f"linear_recurrence, no decay, {LONG}", "forward", 0.65, 0.75, "XLA's product that patches pieces sets the time"),
    Prediction(f"linear_recurrence, no decay, {LONG}", "forward", 0.30, 0.35, "one piece, half of the cores idle", note="1 pieces"),
    Prediction(f"linear_recurrence, no decay, {NARROW}", "forward", 0.09, 0.12, "bytes set the time"),
    Prediction(f"linear_recurrence, decay a channel, {WIDE}", "forward", 1.9, 2.8, "latency of one warpgroup, more than reckoned"),
    Prediction(f"linear_recurrence, decay a channel, {WIDE}", "both", 11.0, 15.0, "as predicted"),
    Prediction(f"linear_recurrence, gated delta, decay a head, {WIDE}", "forward", 8.5, 9.5, "XLA's inverse, at less than 3.0 TB/s"),
    Prediction(f"linear_recurrence, gated delta, decay a head, {WIDE}", "both", 15.0, 17.0, "the same"),
    Prediction(f"linear_recurrence, gated delta, decay a channel, {WIDE}", "forward", 13.0, 16.0, ""),
    Prediction("taylor_attention, normalised, b8 t2048 h16 k16 v64", "forward", 0.15, 0.20, "waits for products of 16 channels"),
    Prediction(
        "taylor_attention, normalised, b2 t8192 h16 k16 v64", "forward", 0.35, 0.40, "32 blocks on 132 cores, each slower than reckoned"
    ),
    Prediction("short_convolution, 4 taps, silu, gate, b16 t8192 d2048", "forward", 0.58, 0.77, "1.2 to 1.6 times its floor, as predicted"),
    Prediction("short_convolution, 4 taps, silu, gate, b16 t8192 d2048", "both", 2.05, 2.82, "1.6 to 2.2 times its floor, as predicted"),
    Prediction("long_convolution, explicit filter, b16 t4096 d768", "forward", 0.70, 0.90, ""),
    Prediction(f"window_attention, causal, {HEADS}", "forward", 0.55, 0.69, "400 to 500 TFLOP/s, as predicted"),
    Prediction("window_attention, window, b1 t16384 h16 k128 v128 w512", "forward", 0.20, 0.27, "as predicted"),
    Prediction(f"landmark_attention, grouped softmax, {HEADS} block63", "forward", 0.79, 1.10, "250 to 350 TFLOP/s, as predicted"),
)
