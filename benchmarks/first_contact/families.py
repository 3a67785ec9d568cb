"""What is checked and timed, by family of kernels, in order of value; and the tiny sizes at which a rehearsal runs
the same without a GPU."""

import collections

from recollect.benchmarks.first_contact import records
from recollect.benchmarks.kernel_shapes import (
    D64,
    D128,
    HEADS,
    LONG,
    LONG_HEADS,
    NARROW,
    SHORT,
    SHORT_LONG,
    TAYLOR,
    TAYLOR_LONG,
    WIDE,
)


class Timing(
    collections.namedtuple(
        "Timing",
        ["operation", "variant", "sizes", "forms", "forced", "note"],
        defaults=[("pallas_gpu",), {}, ""],
    )
):
    """One line of the table.

    operation, variant, sizes: the case. forms: backends, or names of the case's plain forms. forced: block sizes for
    recollect.pallas_kernels.tuning.forced, by kernel; `note` says in the table what they are.
    """

    @property
    def case(self):
        """The case at full size."""
        # The parent of the children reads this file and never imports jax.
        from recollect.benchmarks.kernel_cases import CASES

        return CASES[self.operation, self.variant](**self.sizes)


Family = collections.namedtuple("Family", ["timings", "documents", "full", "rehearsed"], defaults=[True, (0,), 77])
"""Kernels that stand or fall together. timings: in order of value. documents: whether the operation is also checked on
packed documents. full: indices of the timings whose outputs are checked at full size too. rehearsed: tokens of the
check in a rehearsal, where the simulator sets the time."""


RECURRENCE = "linear_recurrence"
LIBRARY = ("pallas_gpu", "cudnn")


def _recurrence(variant: str, *shapes: dict[str, int]) -> tuple[Timing, ...]:
    forms = ("pallas_gpu",) if variant == "no decay" else ("pallas_gpu", "jla")
    return tuple(Timing(RECURRENCE, variant, sizes, forms) for sizes in shapes)


def _spans(operation: str, variant: str, sizes: dict[str, int], *counts: int) -> tuple[Timing, ...]:
    kernel = f"{operation}.gpu_spans"
    return tuple(Timing(operation, variant, sizes, forced={kernel: {"spans": n}}, note=f"{n} spans") for n in counts)


def _attention(d: dict[str, int]) -> tuple[Timing, ...]:
    window = {**LONG_HEADS, **d, "w": 512}
    return (
        Timing("softmax_attention", "causal", {**HEADS, **d}, LIBRARY),
        Timing("softmax_attention", "window", window, LIBRARY),
        Timing("softmax_attention", "window, sinks", window),
        Timing("softmax_attention", "window", {**HEADS, **d, "w": 512}, LIBRARY),
    )


FAMILIES: dict[str, Family] = {
    "attention d128": Family(_attention(D128), full=(0, 1)),
    "recurrence, no decay": Family(
        (*_recurrence("no decay", WIDE, LONG, NARROW), *_spans(RECURRENCE, "no decay", LONG, 1, 4)), full=(0, 1)
    ),
    "recurrence, decay per head": Family(_recurrence("decay per head", WIDE, LONG, NARROW), full=()),
    "delta rule, decay per head": Family(_recurrence("gated delta, decay per head", WIDE, LONG)),
    "recurrence, decay per channel": Family(_recurrence("decay per channel", WIDE, NARROW)),
    "Taylor": Family(
        (
            Timing("taylor_attention", "normalised", TAYLOR),
            Timing("taylor_attention", "normalised", TAYLOR_LONG),
            *_spans("taylor_attention", "normalised", TAYLOR_LONG, 1, 8),
        )
    ),
    "attention d64": Family(_attention(D64)),
    "short convolution": Family(
        (
            Timing("short_convolution", "4 taps, silu, gate", SHORT_LONG, ("pallas_gpu", "lax.conv")),
            Timing("short_convolution", "4 taps, silu, gate", SHORT),
        )
    ),
    "landmark": Family(
        tuple(Timing("landmark_attention", "grouped softmax", {**HEADS, **d, "block": 63}) for d in (D128, D64)),
        documents=False,
    ),
    "head mixture": Family(
        (
            Timing(
                "head_mixture_attention", "routed heads", {**HEADS, **D128, "a": 8}, ("pallas_gpu", "all heads, cudnn")
            ),
        ),
        documents=False,
        full=(),
        rehearsed=24,
    ),
    "delta rule, decay per channel": Family(_recurrence("gated delta, decay per channel", WIDE)),
    "long convolution": Family(
        (Timing("long_convolution", "explicit filter", {"b": 16, "t": 4096, "d": 768}, ("pallas_gpu", "jnp.fft")),),
        documents=False,
        rehearsed=40,
    ),
    "attention tiles": Family(
        tuple(
            Timing(
                "softmax_attention",
                variant,
                sizes,
                forced={"softmax_attention.gpu_tiles": {"query_tile": q, "key_tile": k}},
                note=f"tiles {q} x {k}",
            )
            for variant, sizes in (
                ("causal", {**HEADS, **D128}),
                ("window", {**LONG_HEADS, **D128, "w": 512}),
            )
            for q, k in ((64, 64), (64, 128), (128, 64), (128, 128))
        ),
        full=(),
    ),
}
SWEEPS = ("attention tiles",)
"""Timed, not checked: the same kernels under other block sizes."""

TINY = {"b": 1, "t": 128, "h": 1, "k": 64, "v": 64, "d": 64}


def case_of(timing: Timing, **sizes: int):
    """Returns the timing's case, in a rehearsal at the sizes at which the simulator takes seconds, changed by
    `sizes`."""
    return timing._replace(sizes={**(tiny(timing.sizes) if records.rehearsing() else timing.sizes), **sizes}).case


def tiny(sizes: dict[str, int]) -> dict[str, int]:
    """Returns the sizes at which the simulator takes seconds."""
    small = {name: min(size, TINY.get(name, size)) for name, size in sizes.items()}
    return small | ({"h": 2, "a": 1} if "a" in sizes else {}) | ({"w": 40} if "w" in sizes else {})
