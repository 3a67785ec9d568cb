"""Times that were predicted before any kernel had run on a GPU, from compiled programs and published numbers, and why
each was off.

Predicted on 2026-11-26 for an H100 at 3.0 TB/s of copying, bf16, of the kernels as they were then (commit 1a41889).
`why` was written after the first measurement. Where a kernel has been replaced since, the row of the first measurement
is the one that answers.
"""

import collections

WIDE, LONG, NARROW = "b4 t4096 h64 k128 v128", "b2 t16384 h16 k128 v128", "b8 t2048 h32 k64 v64"
HEADS = "b4 t4096 h16 k128 v128"


Prediction = collections.namedtuple(
    "Prediction",
    ["what", "part", "low", "high", "why", "form", "note", "replaced"],
    defaults=["pallas_gpu", "", False],
)
"""what: a case's name. low, high: milliseconds. part: "forward", or "both" with the gradients. why: of what was
measured. replaced: whether the kernel was replaced before it was ever timed, so that no measurement answers."""

PREDICTIONS = (
    Prediction(
        f"linear_recurrence, no decay, {WIDE}",
        "forward",
        0.40,
        0.55,
        "by the counters 1.6 GB at 86% of main memory's peak: both halves of the values read queries and keys",
    ),
    Prediction(f"linear_recurrence, no decay, {WIDE}", "both", 1.8, 2.7, ""),
    Prediction(f"linear_recurrence, decay per head, {WIDE}", "forward", 0.40, 0.55, "as without decay"),
    Prediction(
        f"linear_recurrence, decay per head, {WIDE}", "both", 1.8, 2.7, "more bytes (6.1 GB) than the range allowed for"
    ),
    Prediction(
        f"linear_recurrence, no decay, {LONG}",
        "forward",
        0.65,
        0.75,
        "the product that patched spans set the time; without it, 0.28",
    ),
    Prediction(f"linear_recurrence, no decay, {LONG}", "forward", 0.30, 0.35, "half of the cores idle", note="1 spans"),
    Prediction(f"linear_recurrence, no decay, {NARROW}", "forward", 0.09, 0.12, ""),
    Prediction(
        f"linear_recurrence, decay per channel, {WIDE}",
        "forward",
        1.9,
        2.8,
        "fewer exponentials and a second warpgroup brought it to 1.85",
    ),
    Prediction(f"linear_recurrence, decay per channel, {WIDE}", "both", 11.0, 15.0, ""),
    Prediction(f"linear_recurrence, gated delta, decay per head, {WIDE}", "forward", 8.5, 9.5, "26.2 GB at 2.5 TB/s"),
    Prediction(f"linear_recurrence, gated delta, decay per head, {WIDE}", "both", 15.0, 17.0, "44.7 GB at 2.4 TB/s"),
    Prediction(f"linear_recurrence, gated delta, decay per channel, {WIDE}", "forward", 13.0, 16.0, "", replaced=True),
    Prediction(
        "taylor_attention, normalised, b8 t2048 h16 k16 v64",
        "forward",
        0.15,
        0.20,
        "latency, as predicted, and more of it",
    ),
    Prediction(
        "taylor_attention, normalised, b2 t8192 h16 k16 v64",
        "forward",
        0.35,
        0.40,
        "each of 32 blocks was slower than thought; 128 blocks take 0.26",
    ),
    Prediction("short_convolution, 4 taps, silu, gate, b16 t8192 d2048", "forward", 0.58, 0.77, ""),
    Prediction("short_convolution, 4 taps, silu, gate, b16 t8192 d2048", "both", 2.05, 2.82, ""),
    Prediction(
        "long_convolution, explicit filter, b16 t4096 d768",
        "forward",
        0.70,
        0.90,
        "1.87 GB would take 0.67 ms, so not bytes alone; not looked into",
    ),
    Prediction(f"softmax_attention, causal, {HEADS}", "forward", 0.55, 0.69, "461 TFLOP/s"),
    Prediction("softmax_attention, window, b1 t16384 h16 k128 v128 w512", "forward", 0.20, 0.27, ""),
    Prediction(f"landmark_attention, grouped softmax, {HEADS} block63", "forward", 0.79, 1.10, ""),
)
