"""The softmax family in `bench kernels`: windows, sinks and grouped heads; landmark blocks; heads that tokens choose.

Plain forms are what one writes in jnp: a masked softmax over all pairs, or jax.nn.dot_product_attention. For heads that
tokens choose they are attention of every head, multiplied by gates of which some are zero, as the public code has it;
also on cuDNN, which routing has to beat.

Work counts the pairs of query and key that are seen, as products with keys and with values.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from recollect.benchmarks.kernel_case import Arrays, Case, normal, sizes_of
from recollect.pallas_kernels.head_mixture_attention import head_mixture_attention
from recollect.pallas_kernels.landmark_attention import landmark_attention
from recollect.pallas_kernels.softmax_attention import softmax_attention


def _window(variant: str, b: int, t: int, h: int, k: int, v: int, w: int | None = None, g: int | None = None) -> Case:
    """w: keys a query sees, None for all before it. g: key heads, None for as many as query heads."""
    with_sinks = "sinks" in variant
    groups = h if g is None else g
    draw = normal({"q": (b, t, h, k), "k": (b, t, groups, k), "v": (b, t, groups, v)})

    def inputs(key, dtype) -> Arrays:
        sinks = {"sinks": jax.random.normal(jax.random.fold_in(key, 1), (h,))} if with_sinks else {}
        return draw(key, dtype) | sinks

    def run(x: Arrays, backend: str | None) -> jax.Array:
        segments = {f"{side}_segments": x["segment_ids"] for side in ("query", "key") if "segment_ids" in x}
        return softmax_attention(x["q"], x["k"], x["v"], window=w, sinks=x.get("sinks"), backend=backend, **segments)

    def dense(x: Arrays) -> jax.Array:
        keys, values = (jnp.repeat(x[name], h // groups, axis=2) for name in ("k", "v"))
        s = jnp.einsum("bihk,bjhk->bhij", x["q"], keys, preferred_element_type=jnp.float32) * k**-0.5
        i, j = jnp.arange(t)[:, None], jnp.arange(t)[None]
        s = jnp.where((j <= i) & (i - j < (w or t)), s, -jnp.inf)
        if with_sinks:
            s = jnp.concatenate([s, jnp.broadcast_to(x["sinks"][None, :, None, None], (b, h, t, 1))], axis=-1)
        weights = jax.nn.softmax(s, axis=-1)[..., :t].astype(values.dtype)
        return jnp.einsum("bhij,bjhv->bihv", weights, values)

    plain: dict[str, Callable[[Arrays], jax.Array]] = {"softmax over all pairs": dense}
    if not with_sinks and k == v:
        before = None if w is None else (w - 1, 0)
        plain["jax.nn"] = lambda x: jax.nn.dot_product_attention(
            x["q"], x["k"], x["v"], is_causal=True, local_window_size=before
        )
    sizes = sizes_of(b=b, t=t, h=h, k=k, v=v, w=w, g=g)
    small = ({} if w is None else {"w": min(w, 100)}) | ({} if g is None else {"h": 4, "g": max(1, 4 * g // h)})
    peer = "sink_attention" if with_sinks else "causal_attention" if w is None else "sliding_attention"
    work = 2.0 * b * h * sum(min(i + 1, w or t) for i in range(t)) * (k + v)
    return Case("softmax_attention", variant, sizes, inputs, run, work, plain, peer, small, ("cudnn", "splash"))


def _landmark(b: int, t: int, h: int, k: int, v: int, block: int = 63) -> Case:
    """block: ordinary tokens a landmark."""
    c = block + 1

    def run(x: Arrays, backend: str | None) -> jax.Array:
        return landmark_attention(x["q"], x["k"], x["v"], block=block, backend=backend)

    def dense(x: Arrays) -> jax.Array:
        """Softmax inside each block, times its landmark's weight in one over landmarks and the query's block."""
        s = jnp.einsum("bihk,bjhk->bhij", x["q"], x["k"], preferred_element_type=jnp.float32) * k**-0.5
        i, j = jnp.arange(t)[:, None], jnp.arange(t)[None]
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
    place, earlier = np.arange(t) % c, np.arange(t) // c
    own = np.minimum(place + 1, block)
    scored, valued = int(np.sum(own + earlier * c)), int(np.sum(own + earlier * block))
    sizes = {"b": b, "t": t, "h": h, "k": k, "v": v, "block": block}
    inputs = normal({"q": (b, t, h, k), "k": (b, t, h, k), "v": (b, t, h, v)})
    work = 2.0 * b * h * (scored * k + valued * v)
    plain = {"softmax over all pairs": dense}
    return Case("landmark_attention", "grouped softmax", sizes, inputs, run, work, plain)


def _mixture(b: int, t: int, h: int, k: int, v: int, a: int) -> Case:
    """a: heads that a token chooses of its h routed ones, the likeliest by a router's logits; gates are h times
    their probabilities."""
    draw = normal({"q": (b, t, h, k), "k": (b, t, h, k), "v": (b, t, h, v)})

    def inputs(key, dtype) -> Arrays:
        return draw(key, dtype) | {"router": jax.random.normal(jax.random.fold_in(key, 1), (b, t, h))}

    def routing(x: Arrays) -> tuple[jax.Array, jax.Array]:
        chosen = jnp.any(jax.nn.one_hot(jax.lax.top_k(x["router"], a)[1], h, dtype=jnp.bool_), axis=-2)
        return chosen, jnp.where(chosen, h * jax.nn.softmax(x["router"], axis=-1), 0)

    def run(x: Arrays, backend: str | None) -> jax.Array:
        chosen, gates = routing(x)
        return head_mixture_attention(x["q"], x["k"], x["v"], chosen, active=a, gates=gates, backend=backend)

    def all_heads(x: Arrays, backend: str) -> jax.Array:
        o = softmax_attention(x["q"], x["k"], x["v"], backend=backend)
        return (o * routing(x)[1][..., None]).astype(o.dtype)

    sizes = {"b": b, "t": t, "h": h, "k": k, "v": v, "a": a}
    # Each token's choices, whichever they are, see all the tokens before it.
    work = 2.0 * b * a * (t * (t + 1) // 2) * (k + v)
    small = {"h": 4, "a": max(1, 4 * a // h)}
    plain = {f"all heads, {name}": functools.partial(all_heads, backend=name) for name in ("cudnn", "xla")}
    return Case("head_mixture_attention", "routed heads", sizes, inputs, run, work, plain, "gated_heads", small)


CASES: dict[tuple[str, str], Callable[..., Case]] = {
    **{
        ("softmax_attention", variant): functools.partial(_window, variant)
        for variant in ("causal", "window", "window, sinks")
    },
    ("landmark_attention", "grouped softmax"): _landmark,
    ("head_mixture_attention", "routed heads"): _mixture,
}

_D64, _D128 = {"k": 64, "v": 64}, {"k": 128, "v": 128}
_WINDOWS = [{"b": b, "t": t, "h": 16, **d, "w": 512} for b, t in ((4, 4096), (1, 16384)) for d in (_D64, _D128)]
ACCELERATOR_SHAPES: dict[str | tuple[str, str], list[dict[str, int]]] = {
    ("softmax_attention", "causal"): [
        {"b": 4, "t": 4096, "h": 16, **_D64},
        {"b": 4, "t": 4096, "h": 16, **_D128},
        {"b": 4, "t": 4096, "h": 16, **_D128, "g": 4},
        {"b": 1, "t": 16384, "h": 16, **_D128},
    ],
    ("softmax_attention", "window"): [*_WINDOWS, {"b": 4, "t": 4096, "h": 16, **_D128, "w": 512, "g": 4}],
    ("softmax_attention", "window, sinks"): [*_WINDOWS, {"b": 4, "t": 4096, "h": 16, **_D128, "w": 512, "g": 4}],
    "landmark_attention": [{"b": 4, "t": 4096, "h": 16, **d, "block": 63} for d in (_D64, _D128)],
    "head_mixture_attention": [{"b": 4, "t": 4096, "h": 16, **_D128, "a": a} for a in (4, 8, 12, 16)],
}
CPU_SHAPES: dict[str | tuple[str, str], list[dict[str, int]]] = {
    ("softmax_attention", "causal"): [{"b": 1, "t": t, "h": 2, **_D64} for t in (256, 1024)],
    ("softmax_attention", "window"): [{"b": 1, "t": t, "h": 2, **_D64, "w": 128} for t in (256, 1024)],
    ("softmax_attention", "window, sinks"): [{"b": 1, "t": 1024, "h": 2, **_D64, "w": 128, "g": 1}],
    "landmark_attention": [{"b": 1, "t": t, "h": 2, **_D64, "block": 63} for t in (256, 1024)],
    "head_mixture_attention": [{"b": 1, "t": 1024, "h": 8, **_D64, "a": a} for a in (2, 4, 6, 8)],
}
GROWTH: dict[str | tuple[str, str], list[dict[str, int]]] = {
    # Work of windows grows with the length and with the window; that of the others with the length's square.
    ("softmax_attention", "causal"): [{"b": 1, "h": 1, **_D64}],
    ("softmax_attention", "window"): [{"b": 1, "h": 1, **_D64, "w": w} for w in (128, 512)],
    "landmark_attention": [{"b": 1, "h": 1, **_D64, "block": 63}],
}
