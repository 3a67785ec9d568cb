"""The shapes that kernels are timed at: those that have a name, and those that `bench kernels` takes, by operation, or
by operation and variant."""

D64, D128 = {"k": 64, "v": 64}, {"k": 128, "v": 128}
HEADS, LONG_HEADS = {"b": 4, "t": 4096, "h": 16}, {"b": 1, "t": 16384, "h": 16}
LONG, WIDE, NARROW = (
    {"b": 2, "t": 16384, "h": 16, **D128},
    {"b": 4, "t": 4096, "h": 64, **D128},
    {"b": 8, "t": 2048, "h": 32, **D64},
)
TAYLOR, TAYLOR_LONG = (
    {"b": 8, "t": 2048, "h": 16, "k": 16, "v": 64},
    {"b": 2, "t": 8192, "h": 16, "k": 16, "v": 64},
)
SHORT, SHORT_LONG = {"b": 8, "t": 2048, "d": 2048}, {"b": 16, "t": 8192, "d": 2048}
_WINDOWS = [
    *({**heads, **d, "w": 512} for heads in (HEADS, LONG_HEADS) for d in (D64, D128)),
    {**HEADS, **D128, "w": 512, "g": 4},
]

ACCELERATOR_SHAPES = {
    "linear_recurrence": [LONG, WIDE, NARROW],
    "taylor_attention": [TAYLOR, TAYLOR_LONG],
    "short_convolution": [SHORT, SHORT_LONG],
    "long_convolution": [{"b": 16, "t": length, "d": 768} for length in (1024, 2048, 4096, 8192)],
    ("softmax_attention", "causal"): [
        {**HEADS, **D64},
        {**HEADS, **D128},
        {**HEADS, **D128, "g": 4},
        {**LONG_HEADS, **D128},
    ],
    ("softmax_attention", "window"): _WINDOWS,
    ("softmax_attention", "window, sinks"): _WINDOWS,
    "landmark_attention": [{**HEADS, **d, "block": 63} for d in (D64, D128)],
    "head_mixture_attention": [{**HEADS, **D128, "a": a} for a in (4, 8, 12, 16)],
}
CPU_SHAPES = {
    "linear_recurrence": [{"b": 1, "t": length, "h": 2, **D64} for length in (256, 1024)],
    "taylor_attention": [{"b": 1, "t": length, "h": 2, "k": 16, "v": 64} for length in (256, 1024)],
    "short_convolution": [{"b": 4, "t": 1024, "d": 256}],
    "long_convolution": [{"b": 4, "t": length, "d": 64} for length in (256, 1024)],
    ("softmax_attention", "causal"): [{"b": 1, "t": t, "h": 2, **D64} for t in (256, 1024)],
    ("softmax_attention", "window"): [{"b": 1, "t": t, "h": 2, **D64, "w": 128} for t in (256, 1024)],
    ("softmax_attention", "window, sinks"): [{"b": 1, "t": 1024, "h": 2, **D64, "w": 128, "g": 1}],
    "landmark_attention": [{"b": 1, "t": t, "h": 2, **D64, "block": 63} for t in (256, 1024)],
    "head_mixture_attention": [{"b": 1, "t": 1024, "h": 8, **D64, "a": a} for a in (2, 4, 6, 8)],
}
GROWTH = {
    "linear_recurrence": [{"b": 1, "h": 1, **D64}],
    "taylor_attention": [{"b": 1, "h": 1, "k": 16, "v": 64}],
    "short_convolution": [{"b": 1, "d": 64}],
    "long_convolution": [{"b": 1, "d": 64}],
    # Work of windows grows with the length and with the window; that of the others with the length's square.
    ("softmax_attention", "causal"): [{"b": 1, "h": 1, **D64}],
    ("softmax_attention", "window"): [{"b": 1, "h": 1, **D64, "w": w} for w in (128, 512)],
    "landmark_attention": [{"b": 1, "h": 1, **D64, "block": 63}],
}
"""What `--lengths` takes at each length."""


def shapes_of(shapes: dict, operation: str, variant: str) -> list[dict[str, int]]:
    """Returns those of the variant where it has its own, else of the operation; none for a variant that is not
    listed."""
    return shapes.get((operation, variant), shapes.get(operation, []))
