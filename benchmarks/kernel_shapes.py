"""The shapes that `bench kernels` takes, by operation, or by operation and variant."""

Shapes = dict[str | tuple[str, str], list[dict[str, int]]]

_D64, _D128 = {"k": 64, "v": 64}, {"k": 128, "v": 128}
_HEADS = {"b": 4, "t": 4096, "h": 16}
_WINDOWS = [{"b": b, "t": t, "h": 16, **d, "w": 512} for b, t in ((4, 4096), (1, 16384)) for d in (_D64, _D128)]
_WINDOWS += [{**_HEADS, **_D128, "w": 512, "g": 4}]

ACCELERATOR_SHAPES: Shapes = {
    "linear_recurrence": [
        {"b": 2, "t": 16384, "h": 16, **_D128},
        {"b": 4, "t": 4096, "h": 64, **_D128},
        {"b": 8, "t": 2048, "h": 32, **_D64},
    ],
    "taylor_attention": [
        {"b": 8, "t": 2048, "h": 16, "k": 16, "v": 64},
        {"b": 2, "t": 8192, "h": 16, "k": 16, "v": 64},
    ],
    "short_convolution": [{"b": 8, "t": 2048, "d": 2048}, {"b": 16, "t": 8192, "d": 2048}],
    "long_convolution": [{"b": 16, "t": length, "d": 768} for length in (1024, 2048, 4096, 8192)],
    ("softmax_attention", "causal"): [
        {**_HEADS, **_D64},
        {**_HEADS, **_D128},
        {**_HEADS, **_D128, "g": 4},
        {"b": 1, "t": 16384, "h": 16, **_D128},
    ],
    ("softmax_attention", "window"): _WINDOWS,
    ("softmax_attention", "window, sinks"): _WINDOWS,
    "landmark_attention": [{**_HEADS, **d, "block": 63} for d in (_D64, _D128)],
    "head_mixture_attention": [{**_HEADS, **_D128, "a": a} for a in (4, 8, 12, 16)],
}
CPU_SHAPES: Shapes = {
    "linear_recurrence": [{"b": 1, "t": length, "h": 2, **_D64} for length in (256, 1024)],
    "taylor_attention": [{"b": 1, "t": length, "h": 2, "k": 16, "v": 64} for length in (256, 1024)],
    "short_convolution": [{"b": 4, "t": 1024, "d": 256}],
    "long_convolution": [{"b": 4, "t": length, "d": 64} for length in (256, 1024)],
    ("softmax_attention", "causal"): [{"b": 1, "t": t, "h": 2, **_D64} for t in (256, 1024)],
    ("softmax_attention", "window"): [{"b": 1, "t": t, "h": 2, **_D64, "w": 128} for t in (256, 1024)],
    ("softmax_attention", "window, sinks"): [{"b": 1, "t": 1024, "h": 2, **_D64, "w": 128, "g": 1}],
    "landmark_attention": [{"b": 1, "t": t, "h": 2, **_D64, "block": 63} for t in (256, 1024)],
    "head_mixture_attention": [{"b": 1, "t": 1024, "h": 8, **_D64, "a": a} for a in (2, 4, 6, 8)],
}
GROWTH: Shapes = {
    "linear_recurrence": [{"b": 1, "h": 1, **_D64}],
    "taylor_attention": [{"b": 1, "h": 1, "k": 16, "v": 64}],
    "short_convolution": [{"b": 1, "d": 64}],
    "long_convolution": [{"b": 1, "d": 64}],
    # Work of windows grows with the length and with the window; that of the others with the length's square.
    ("softmax_attention", "causal"): [{"b": 1, "h": 1, **_D64}],
    ("softmax_attention", "window"): [{"b": 1, "h": 1, **_D64, "w": w} for w in (128, 512)],
    "landmark_attention": [{"b": 1, "h": 1, **_D64, "block": 63}],
}
"""What `--lengths` takes at each length."""


def shapes_of(shapes: Shapes, operation: str, variant: str) -> list[dict[str, int]]:
    """Returns those of the variant where it has its own, else of the operation; none for a variant that is not
    listed."""
    return shapes.get((operation, variant), shapes.get(operation, []))
