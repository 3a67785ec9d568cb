"""What is checked and timed, by family of kernels, in order of value; and the tiny sizes at which a rehearsal runs
the same without a GPU."""

import collections
import dataclasses
from collections.abc import Mapping

from recollect.benchmarks.first_contact import records

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Timing:
    """One line of the table.

    operation, variant, sizes: the case. forms: backends, or names of the case's plain forms. forced: block sizes for
    recollect.pallas_kernels.tuning.forced, by kernel; `note` says in the table what they are.
    """

    operation: str
    variant: str
    sizes: Sizes
    forms: tuple[str, ...] = ("pallas_gpu",)
    forced: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    note: str = ""

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
WIDE = {"b": 4, "t": 4096, "h": 64, "k": 128, "v": 128}
LONG = {"b": 2, "t": 16384, "h": 16, "k": 128, "v": 128}
NARROW = {"b": 8, "t": 2048, "h": 32, "k": 64, "v": 64}
TAYLOR_LONG = {"b": 2, "t": 8192, "h": 16, "k": 16, "v": 64}
HEADS = {"b": 4, "t": 4096, "h": 16}
LONG_HEADS = {"b": 1, "t": 16384, "h": 16}
D64, D128 = {"k": 64, "v": 64}, {"k": 128, "v": 128}
LIBRARY = ("pallas_gpu", "cudnn")


def _recurrence(variant: str, *shapes: Sizes) -> tuple[Timing, ...]:
    forms = ("pallas_gpu",) if variant == "no decay" else ("pallas_gpu", "jla")
    return tuple(Timing(RECURRENCE, variant, sizes, forms) for sizes in shapes)


def _spans(operation: str, variant: str, sizes: Sizes, *counts: int) -> tuple[Timing, ...]:
    kernel = f"{operation}.gpu_spans"
    return tuple(Timing(operation, variant, sizes, forced={kernel: {"spans": n}}, note=f"{n} spans") for n in counts)


def _attention(d: Sizes) -> tuple[Timing, ...]:
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
            Timing("taylor_attention", "normalised", {"b": 8, "t": 2048, "h": 16, "k": 16, "v": 64}),
            Timing("taylor_attention", "normalised", TAYLOR_LONG),
            *_spans("taylor_attention", "normalised", TAYLOR_LONG, 1, 8),
        )
    ),
    "attention d64": Family(_attention(D64)),
    "short convolution": Family(
        (
            Timing(
                "short_convolution", "4 taps, silu, gate", {"b": 16, "t": 8192, "d": 2048}, ("pallas_gpu", "lax.conv")
            ),
            Timing("short_convolution", "4 taps, silu, gate", {"b": 8, "t": 2048, "d": 2048}),
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
    full = tiny(timing.sizes) if records.rehearsing() else timing.sizes
    return dataclasses.replace(timing, sizes={**full, **sizes}).case


def tiny(sizes: Sizes) -> dict[str, int]:
    """Returns the sizes at which the simulator takes seconds."""
    small = {name: min(size, TINY.get(name, size)) for name, size in sizes.items()}
    if "a" in sizes:
        small |= {"h": 2, "a": 1}
    return small | ({"w": 40} if "w" in sizes else {})
