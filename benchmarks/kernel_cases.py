"""What `bench kernels` times, and how each operation is called (at which shapes: kernel_shapes.py).

A case draws its inputs, calls the operation's public function on a named backend and, where there is one, a plain form
that somebody without this project would write in jnp. Gradients are those of every array the case hands over.

Plain forms of softmax attention are a masked softmax over all pairs, or jax.nn.dot_product_attention. For heads that
tokens choose they are attention of every head, multiplied by gates of which some are zero, as the public code has it;
also on cuDNN, which routing has to beat. Their work counts the pairs of query and key that are seen, as products with
keys and with values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from recollect.benchmarks.kernel_case import Arrays, Case
from recollect.benchmarks.kernel_shapes import ACCELERATOR_SHAPES, CPU_SHAPES, shapes_of
from recollect.pallas_kernels import (
    head_mixture_attention,
    landmark_attention,
    linear_recurrence,
    long_convolution,
    short_convolution,
    softmax_attention,
    taylor_attention,
)
from recollect.pallas_kernels.linear_recurrence.reference import quadratic

SIZES = (*"bthkvwg", "block", "a", "d")
"""Sizes that a case may have, in the order in which its name gives them."""


def _normal(shapes: dict[str, tuple[int, ...]], **more):
    """Returns the function (key, dtype) -> arrays of these shapes, drawn from the standard normal distribution, and
    beside them what the functions `more` draw with a key of their own, in fp32."""

    def inputs(key, dtype) -> Arrays:
        keys = zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
        arrays = {name: jax.random.normal(each, shape).astype(dtype) for each, (name, shape) in keys}
        return arrays | {name: draw(jax.random.fold_in(key, 1)) for name, draw in more.items()}

    return inputs


def _qkv(b: int, t: int, h: int, k: int, v: int, g: int | None = None) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of queries, keys and values. g: key heads, None for as many as query heads."""
    return {"q": (b, t, h, k), "k": (b, t, g or h, k), "v": (b, t, g or h, v)}


def _recurrence(variant: str, b: int, t: int, h: int, k: int, v: int) -> dict:
    def inputs(key, dtype) -> Arrays:
        arrays = _normal(_qkv(b, t, h, k, v))(key, jnp.float32)
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

    return {
        "inputs": inputs,
        "run": run,
        # The square form of a decay per channel holds a (t, t, k) array per head; the delta rule has none.
        "plain": {"square form": square} if variant in ("no decay", "decay per head") else {},
        "work": (3 if "delta" in variant else 2) * 2.0 * b * t * h * k * v,
        "peer": RECURRENCES[variant],
        "libraries": ("jla",),
    }


def _taylor(b: int, t: int, h: int, k: int, v: int) -> dict:
    def run(x: Arrays, backend: str | None) -> jax.Array:
        return taylor_attention(x["q"], x["k"], x["v"], segment_ids=x.get("segment_ids"), backend=backend)[0]

    def square(x: Arrays) -> jax.Array:
        s = _scores(x["q"], x["k"])
        weights = jnp.where(jnp.tril(jnp.ones((t, t), bool)), 1 + s + s * s / 2, 0)
        o = jnp.einsum("bhij,bjhv->bihv", weights, x["v"].astype(jnp.float32))
        return (o / jnp.moveaxis(jnp.sum(weights, axis=-1), 1, 2)[..., None]).astype(x["v"].dtype)

    return {
        "inputs": _normal(_qkv(b, t, h, k, v)),
        "run": run,
        "plain": {"square form": square},
        "work": 4.0 * b * t * h * (1 + k + k * (k + 1) // 2) * (v + 1),
        "peer": "based",
    }


def _short(b: int, t: int, d: int) -> dict:
    def run(x: Arrays, backend: str | None) -> jax.Array:
        return short_convolution(
            x["x"],
            x["taps"],
            out_gate=x["out_gate"],
            activation="silu",
            segment_ids=x.get("segment_ids"),
            backend=backend,
        )[0]

    def library(x: Arrays) -> jax.Array:
        filters = jnp.flip(x["taps"], 0).astype(x["x"].dtype)[:, None]
        layout = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": d}
        return jax.nn.silu(jax.lax.conv_general_dilated(x["x"], filters, (1,), [(3, 0)], **layout)) * x["out_gate"]

    return {
        "inputs": _normal({"x": (b, t, d), "out_gate": (b, t, d)}, taps=lambda key: jax.random.normal(key, (4, d)) / 2),
        "run": run,
        "plain": {"lax.conv": library},
        "work": 8.0 * b * t * d,
        "peer": "short_conv",
    }


def _long(b: int, t: int, d: int) -> dict:
    def inputs(key, dtype) -> Arrays:
        keys = jax.random.split(key, 2)
        filter = jax.random.normal(keys[1], (t, d)) * jnp.exp(-jnp.arange(t) / (t / 4))[:, None] * t**-0.5
        return {"x": jax.random.normal(keys[0], (b, t, d)).astype(dtype), "filter": filter}

    def run(x: Arrays, backend: str | None) -> jax.Array:
        return long_convolution(x["x"], x["filter"], backend=backend)

    def transform(x: Arrays) -> jax.Array:
        spectrum = jnp.fft.rfft(x["x"].astype(jnp.float32), 2 * t, axis=1) * jnp.fft.rfft(x["filter"], 2 * t, axis=0)
        return jnp.fft.irfft(spectrum, 2 * t, axis=1)[:, :t].astype(x["x"].dtype)

    return {"inputs": inputs, "run": run, "plain": {"jnp.fft": transform}, "work": 0.0}


def _window(variant: str, b: int, t: int, h: int, k: int, v: int, w: int | None = None, g: int | None = None) -> dict:
    """w: keys a query sees, None for all before it. g: key heads, None for as many as query heads."""
    sinks = {"sinks": lambda key: jax.random.normal(key, (h,))} if "sinks" in variant else {}

    def run(x: Arrays, backend: str | None) -> jax.Array:
        segments = {f"{side}_segments": x["segment_ids"] for side in ("query", "key") if "segment_ids" in x}
        return softmax_attention(x["q"], x["k"], x["v"], window=w, sinks=x.get("sinks"), backend=backend, **segments)

    def dense(x: Arrays) -> jax.Array:
        keys, values = (jnp.repeat(x[name], h // (g or h), axis=2) for name in ("k", "v"))
        i, j = jnp.arange(t)[:, None], jnp.arange(t)[None]
        s = jnp.where((j <= i) & (i - j < (w or t)), _scores(x["q"], keys), -jnp.inf)
        if sinks:
            s = jnp.concatenate([s, jnp.broadcast_to(x["sinks"][None, :, None, None], (b, h, t, 1))], axis=-1)
        return jnp.einsum("bhij,bjhv->bihv", jax.nn.softmax(s, axis=-1)[..., :t].astype(values.dtype), values)

    def library(x: Arrays) -> jax.Array:
        return jax.nn.dot_product_attention(
            x["q"], x["k"], x["v"], is_causal=True, local_window_size=None if w is None else (w - 1, 0)
        )

    return {
        "inputs": _normal(_qkv(b, t, h, k, v, g), **sinks),
        "run": run,
        "plain": {"softmax over all pairs": dense} | ({} if sinks or k != v else {"jax.nn": library}),
        "work": 2.0 * b * h * sum(min(i + 1, w or t) for i in range(t)) * (k + v),
        "peer": "sink_attention" if sinks else "causal_attention" if w is None else "sliding_attention",
        "small": ({} if w is None else {"w": min(w, 100)}) | ({} if g is None else {"h": 4, "g": max(1, 4 * g // h)}),
        "libraries": ("cudnn", "splash"),
    }


def _landmark(b: int, t: int, h: int, k: int, v: int, block: int) -> dict:
    """block: ordinary tokens a landmark."""
    c = block + 1

    def run(x: Arrays, backend: str | None) -> jax.Array:
        return landmark_attention(x["q"], x["k"], x["v"], block=block, backend=backend)

    def dense(x: Arrays) -> jax.Array:
        """Softmax inside each block, times its landmark's weight in one over landmarks and the query's block."""
        s, (i, j) = _scores(x["q"], x["k"]), (jnp.arange(t)[:, None], jnp.arange(t)[None])
        landmark, same_block, earlier = j % c == block, i // c == j // c, j // c < i // c
        outer = jax.nn.softmax(jnp.where(jnp.where(landmark, earlier, same_block & (j <= i)), s, -1e30), axis=-1)

        def in_blocks(x: jax.Array, fill: float) -> jax.Array:
            return jnp.pad(x, ((0, 0),) * 3 + ((0, -t % c),), constant_values=fill).reshape(b, h, t, -1, c)

        inner = jax.nn.softmax(in_blocks(jnp.where(landmark, -1e30, s), -1e30), axis=-1)
        inner *= jnp.sum(in_blocks(jnp.where(landmark & earlier, outer, 0), 0), axis=-1, keepdims=True)
        inner = inner.reshape(b, h, t, -1)[..., :t]
        weights = jnp.where(same_block & ~landmark & (j <= i), outer, inner).astype(x["v"].dtype)
        return jnp.einsum("bhij,bjhv->bihv", weights, x["v"])

    # An earlier block is one super-token: scores of all its tokens, landmark included, and values of the ordinary ones.
    own, earlier = np.minimum(np.arange(t) % c + 1, block), np.arange(t) // c
    return {
        "inputs": _normal(_qkv(b, t, h, k, v)),
        "run": run,
        "plain": {"softmax over all pairs": dense},
        "work": 2.0 * b * h * (int(np.sum(own + earlier * c)) * k + int(np.sum(own + earlier * block)) * v),
    }


def _mixture(b: int, t: int, h: int, k: int, v: int, a: int) -> dict:
    """a: heads that a token chooses of its h routed ones, the likeliest by a router's logits; gates are h times
    their probabilities."""

    def routing(x: Arrays) -> tuple[jax.Array, jax.Array]:
        chosen = jnp.any(jax.nn.one_hot(jax.lax.top_k(x["router"], a)[1], h, dtype=jnp.bool_), axis=-2)
        return chosen, jnp.where(chosen, h * jax.nn.softmax(x["router"], axis=-1), 0)

    def run(x: Arrays, backend: str | None) -> jax.Array:
        chosen, gates = routing(x)
        return head_mixture_attention(x["q"], x["k"], x["v"], chosen, active=a, gates=gates, backend=backend)

    def all_heads(x: Arrays, backend: str) -> jax.Array:
        o = softmax_attention(x["q"], x["k"], x["v"], backend=backend)
        return (o * routing(x)[1][..., None]).astype(o.dtype)

    return {
        "inputs": _normal(_qkv(b, t, h, k, v), router=lambda key: jax.random.normal(key, (b, t, h))),
        "run": run,
        "plain": {f"all heads, {name}": functools.partial(all_heads, backend=name) for name in ("cudnn", "xla")},
        # Each token's choices, whichever they are, see all the tokens before it.
        "work": 2.0 * b * a * (t * (t + 1) // 2) * (k + v),
        "peer": "gated_heads",
        "small": {"h": 4, "a": max(1, 4 * a // h)},
    }


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the scaled products of all pairs, (b, h, i, j) in fp32."""
    return jnp.einsum("bihk,bjhk->bhij", q, k, preferred_element_type=jnp.float32) * k.shape[-1] ** -0.5


RECURRENCES = {
    "no decay": "linear_attention",
    "decay per head": "simple_gla",
    "decay per channel": "gla",
    "gated delta, decay per head": "gated_delta_rule",
    "gated delta, decay per channel": "kda",
}
"""Variants of the recurrence, and each one's peer."""

FACTS = {  # functions of the sizes that return the rest of a Case
    **{("linear_recurrence", variant): functools.partial(_recurrence, variant) for variant in RECURRENCES},
    ("taylor_attention", "normalised"): _taylor,
    ("short_convolution", "4 taps, silu, gate"): _short,
    ("long_convolution", "explicit filter"): _long,
    **{("softmax_attention", name): functools.partial(_window, name) for name in ("causal", "window", "window, sinks")},
    ("landmark_attention", "grouped softmax"): _landmark,
    ("head_mixture_attention", "routed heads"): _mixture,
}


def _case(operation: str, variant: str, **sizes: int) -> Case:
    in_order = {name: sizes[name] for name in SIZES if name in sizes}
    return Case(operation, variant, in_order, **FACTS[operation, variant](**sizes))


CASES = {key: functools.partial(_case, *key) for key in FACTS}
OPERATIONS = tuple(dict.fromkeys(operation for operation, _ in CASES))


def cases(platform: str, operations: list[str]) -> list[Case]:
    """Returns the cases of these operations at the shapes for this platform ("cpu", "gpu", "tpu")."""
    shapes = CPU_SHAPES if platform == "cpu" else ACCELERATOR_SHAPES
    return [make(**sizes) for key, make in CASES.items() if key[0] in operations for sizes in shapes_of(shapes, *key)]


def smaller(case: Case) -> Case:
    """Returns the same heads' sizes, few of them and few tokens: what gradients are checked at."""
    few = {name: min(most, case.sizes[name]) for name, most in (("b", 1), ("t", 320), ("h", 2)) if name in case.sizes}
    return resized(case, **{**few, **case.small})


def resized(case: Case, **sizes: int) -> Case:
    """Returns the case with some sizes changed."""
    return CASES[case.operation, case.variant](**{**case.sizes, **sizes})
