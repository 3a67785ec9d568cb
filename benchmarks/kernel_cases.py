"""What `bench kernels` times: operations at shapes that people train, and how each is called (softmax attention:
kernel_cases_softmax.py).

A case draws its inputs, calls the operation's public function on a named backend and, where there is one, a plain form
that somebody without this project would write in jnp. Gradients are those of every array the case hands over.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from recollect.benchmarks import kernel_cases_softmax
from recollect.benchmarks.kernel_case import Arrays, Case, normal
from recollect.pallas_kernels.gated_convolution import long_convolution, short_convolution
from recollect.pallas_kernels.linear_recurrence import linear_recurrence
from recollect.pallas_kernels.linear_recurrence.reference import quadratic
from recollect.pallas_kernels.taylor_attention import taylor_attention


def _recurrence(variant: str, b: int, t: int, h: int, k: int, v: int) -> Case:
    draw = normal({"q": (b, t, h, k), "k": (b, t, h, k), "v": (b, t, h, v)})

    def inputs(key, dtype) -> Arrays:
        arrays = draw(key, jnp.float32)
        arrays["k"] /= jnp.linalg.norm(arrays["k"], axis=-1, keepdims=True)
        arrays = {name: x.astype(dtype) for name, x in arrays.items()}
        decay, beta = (jax.random.fold_in(key, number) for number in (1, 2))
        if "decay per" in variant:
            shape = (b, t, h, k) if "channel" in variant else (b, t, h)
            arrays["log_decay"] = jax.nn.log_sigmoid(jax.random.normal(decay, shape) + 3)
        return arrays | ({"beta": jax.nn.sigmoid(jax.random.normal(beta, (b, t, h)))} if "delta" in variant else {})

    def run(x: Arrays, backend: str | None) -> jax.Array:
        terms = {"log_decay": x.get("log_decay"), "segment_ids": x.get("segment_ids"), "scale": k**-0.5}
        if "beta" in x:
            terms |= {"erase_read": (x["beta"][..., None] * x["k"]).astype(x["k"].dtype), "write_strength": x["beta"]}
        return linear_recurrence(x["q"], x["k"], x["v"], **terms, backend=backend)[0]

    def square(x: Arrays) -> jax.Array:
        return quadratic(x["q"], x["k"], x["v"], log_decay=x.get("log_decay"), scale=k**-0.5).astype(x["v"].dtype)

    # The square form of a decay per channel holds a (t, t, k) array per head; the delta rule has none.
    plain = {"square form": square} if variant in ("no decay", "decay per head") else {}
    work = (3 if "delta" in variant else 2) * 2.0 * b * t * h * k * v
    sizes = {"b": b, "t": t, "h": h, "k": k, "v": v}
    peer, libraries = RECURRENCES[variant], ("jla",)
    return Case("linear_recurrence", variant, sizes, inputs, run, work, plain, peer, libraries=libraries)


def _taylor(b: int, t: int, h: int, k: int, v: int) -> Case:
    inputs = normal({"q": (b, t, h, k), "k": (b, t, h, k), "v": (b, t, h, v)})

    def run(x: Arrays, backend: str | None) -> jax.Array:
        return taylor_attention(x["q"], x["k"], x["v"], segment_ids=x.get("segment_ids"), backend=backend)[0]

    def square(x: Arrays) -> jax.Array:
        s = jnp.einsum("bihk,bjhk->bhij", x["q"], x["k"], preferred_element_type=jnp.float32) * k**-0.5
        weights = jnp.where(jnp.tril(jnp.ones((t, t), bool)), 1 + s + s * s / 2, 0)
        o = jnp.einsum("bhij,bjhv->bihv", weights, x["v"].astype(jnp.float32))
        return (o / jnp.moveaxis(jnp.sum(weights, axis=-1), 1, 2)[..., None]).astype(x["v"].dtype)

    work = 4.0 * b * t * h * (1 + k + k * (k + 1) // 2) * (v + 1)
    sizes = {"b": b, "t": t, "h": h, "k": k, "v": v}
    return Case("taylor_attention", "normalised", sizes, inputs, run, work, {"square form": square}, "based")


def _short(b: int, t: int, d: int) -> Case:
    draw = normal({"x": (b, t, d), "out_gate": (b, t, d)})

    def inputs(key, dtype) -> Arrays:
        return draw(key, dtype) | {"taps": jax.random.normal(jax.random.fold_in(key, 1), (4, d)) / 2}

    def run(x: Arrays, backend: str | None) -> jax.Array:
        how = {"activation": "silu", "segment_ids": x.get("segment_ids"), "backend": backend}
        return short_convolution(x["x"], x["taps"], out_gate=x["out_gate"], **how)[0]

    def library(x: Arrays) -> jax.Array:
        filters = jnp.flip(x["taps"], 0).astype(x["x"].dtype)[:, None]
        layout = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": d}
        return jax.nn.silu(jax.lax.conv_general_dilated(x["x"], filters, (1,), [(3, 0)], **layout)) * x["out_gate"]

    sizes, plain = {"b": b, "t": t, "d": d}, {"lax.conv": library}
    return Case("short_convolution", "4 taps, silu, gate", sizes, inputs, run, 8.0 * b * t * d, plain, "short_conv")


def _long(b: int, t: int, d: int) -> Case:
    def inputs(key, dtype) -> Arrays:
        keys = jax.random.split(key, 2)
        filter = jax.random.normal(keys[1], (t, d)) * jnp.exp(-jnp.arange(t) / (t / 4))[:, None] * t**-0.5
        return {"x": jax.random.normal(keys[0], (b, t, d)).astype(dtype), "filter": filter}

    def run(x: Arrays, backend: str | None) -> jax.Array:
        return long_convolution(x["x"], x["filter"], backend=backend)

    def transform(x: Arrays) -> jax.Array:
        spectrum = jnp.fft.rfft(x["x"].astype(jnp.float32), 2 * t, axis=1) * jnp.fft.rfft(x["filter"], 2 * t, axis=0)
        return jnp.fft.irfft(spectrum, 2 * t, axis=1)[:, :t].astype(x["x"].dtype)

    sizes = {"b": b, "t": t, "d": d}
    return Case("long_convolution", "explicit filter", sizes, inputs, run, 0.0, {"jnp.fft": transform})


RECURRENCES = {
    "no decay": "linear_attention",
    "decay per head": "simple_gla",
    "decay per channel": "gla",
    "gated delta, decay per head": "gated_delta_rule",
    "gated delta, decay per channel": "kda",
}
"""Variants of the recurrence, and each one's peer."""

CASES: dict[tuple[str, str], Callable[..., Case]] = {
    **{("linear_recurrence", variant): functools.partial(_recurrence, variant) for variant in RECURRENCES},
    ("taylor_attention", "normalised"): _taylor,
    ("short_convolution", "4 taps, silu, gate"): _short,
    ("long_convolution", "explicit filter"): _long,
    **kernel_cases_softmax.CASES,
}

Shapes = dict[str | tuple[str, str], list[dict[str, int]]]
"""By operation, or by operation and variant."""

ACCELERATOR_SHAPES: Shapes = {
    "linear_recurrence": [
        {"b": 2, "t": 16384, "h": 16, "k": 128, "v": 128},
        {"b": 4, "t": 4096, "h": 64, "k": 128, "v": 128},
        {"b": 8, "t": 2048, "h": 32, "k": 64, "v": 64},
    ],
    "taylor_attention": [
        {"b": 8, "t": 2048, "h": 16, "k": 16, "v": 64},
        {"b": 2, "t": 8192, "h": 16, "k": 16, "v": 64},
    ],
    "short_convolution": [{"b": 8, "t": 2048, "d": 2048}, {"b": 16, "t": 8192, "d": 2048}],
    "long_convolution": [{"b": 16, "t": length, "d": 768} for length in (1024, 2048, 4096, 8192)],
    **kernel_cases_softmax.ACCELERATOR_SHAPES,
}
CPU_SHAPES: Shapes = {
    "linear_recurrence": [{"b": 1, "t": length, "h": 2, "k": 64, "v": 64} for length in (256, 1024)],
    "taylor_attention": [{"b": 1, "t": length, "h": 2, "k": 16, "v": 64} for length in (256, 1024)],
    "short_convolution": [{"b": 4, "t": 1024, "d": 256}],
    "long_convolution": [{"b": 4, "t": length, "d": 64} for length in (256, 1024)],
    **kernel_cases_softmax.CPU_SHAPES,
}
GROWTH: Shapes = {
    "linear_recurrence": [{"b": 1, "h": 1, "k": 64, "v": 64}],
    "taylor_attention": [{"b": 1, "h": 1, "k": 16, "v": 64}],
    "short_convolution": [{"b": 1, "d": 64}],
    "long_convolution": [{"b": 1, "d": 64}],
    **kernel_cases_softmax.GROWTH,
}
"""What `--lengths` takes at each length."""


def shapes_of(shapes: Shapes, operation: str, variant: str) -> list[dict[str, int]]:
    """Those of the variant where it has its own, else of the operation; none for a variant that is not listed."""
    return shapes.get((operation, variant), shapes.get(operation, []))


def cases(platform: str, operations: list[str]) -> list[Case]:
    """The cases of these operations at the shapes for this platform ("cpu", "gpu", "tpu")."""
    shapes = CPU_SHAPES if platform == "cpu" else ACCELERATOR_SHAPES
    return [make(**sizes) for key, make in CASES.items() if key[0] in operations for sizes in shapes_of(shapes, *key)]


def smaller(case: Case) -> Case:
    """The same heads' sizes, few of them and few tokens: what gradients are checked at."""
    few = {name: min(most, case.sizes[name]) for name, most in (("b", 1), ("t", 320), ("h", 2)) if name in case.sizes}
    return CASES[case.operation, case.variant](**{**case.sizes, **few, **case.small})


OPERATIONS = tuple(dict.fromkeys(operation for operation, _ in CASES))
