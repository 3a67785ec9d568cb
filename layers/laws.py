"""The laws that every mixer obeys, as plain functions: each takes a `Subject` and raises `LawBroken`, which names the
first input at which it does not hold.

    subject = Subject(SlidingWindow(window=7))
    law_1_causal(subject)

`not_asked` gives the laws that a mixer's traits exempt it from. Laws of streams are in streaming_laws.py, of a mixer in
a model that is trained in training/laws.py, of one that is exported in export/laws.py. tests/layers/test_mixer_laws.py
runs all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recollect.layers import streaming_laws
from recollect.layers.context import Context, Source
from recollect.layers.law_subject import (
    BF16,
    DOCUMENTS,
    FP32,
    LENGTH,
    SOURCE_DOCUMENTS,
    WIDTH,
    LawBroken,
    Subject,
    inputs,
    require,
    require_close,
    require_refusal,
)
from recollect.layers.traits import Traits
from recollect.pallas_kernels.dispatch import preferred_backend


def law_1_causal(subject: Subject) -> None:
    """No output depends on a later input, and each depends on its own."""
    x = inputs(LENGTH)
    base = np.asarray(subject.call(x))
    for token in (0, 1, 17, LENGTH - 1):
        changed = np.asarray(subject.call(x.at[:, token].add(1.0)))
        before, what = base[:, :token], f"a change of input token {token} reaches an earlier output"
        if subject.traits.exact_causality:
            for row, earlier in np.argwhere((changed[:, :token] != before).any(-1)):
                raise LawBroken(f"{what}: first at row {row}, token {earlier}")
        elif token:
            require_close(changed[:, :token], before, 1e-5, what)
        own = np.abs(changed[:, token] - base[:, token]).max()
        require(own > 1e-4, f"output token {token} does not depend on its own input: adding 1 to it changes {own:.1g}")


def law_3_packing(subject: Subject) -> None:
    """A document's outputs are the same in a packed row and alone."""
    x = inputs(LENGTH)
    packed = np.asarray(subject.call(x, Context(segments=jnp.asarray(DOCUMENTS))))
    for row in range(2):
        for segment in sorted(set(DOCUMENTS[row]) - {0}):
            tokens = np.flatnonzero(DOCUMENTS[row] == segment)
            alone = np.zeros((2, LENGTH, WIDTH), np.float32)
            alone[0, : len(tokens)] = np.asarray(x)[row, tokens]
            segments = np.zeros((2, LENGTH), np.int32)
            segments[0, : len(tokens)] = 1
            out = np.asarray(subject.call(jnp.asarray(alone), Context(segments=jnp.asarray(segments))))
            place = f"row {row}, tokens {tokens[0]} to {tokens[-1]}"
            what = f"the document of segment {segment} ({place}) differs from the same tokens alone"
            require_close(packed[row, tokens][None], out[:1, : len(tokens)], FP32, what)
    # And alone without any segments at all, which takes another path.
    tokens = np.flatnonzero(DOCUMENTS[1] == 7)
    what = "a packed document differs from the same tokens without segments"
    require_close(packed[1:, tokens], subject.call(x[1:, tokens]), FP32, what)


def law_4_padding(subject: Subject) -> None:
    """NaN in padding changes no bit of a loss over the other tokens, nor of its gradients."""
    segments = jnp.asarray(DOCUMENTS).at[1, :6].set(0)  # padding before, too
    real = (segments != 0)[..., None]
    x = inputs(LENGTH)

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        out = nnx.merge(subject.graph, weights)(x, subject.with_source(Context(segments=segments), 2)).hidden
        return jnp.sum(jnp.where(real, jnp.sin(out), 0))

    grad_fn = jax.jit(jax.value_and_grad(loss))
    value, clean = grad_fn(subject.weights, jnp.where(real, x, 0))
    poisoned, grads = grad_fn(subject.weights, jnp.where(real, x, jnp.nan))
    what = f"NaN in padding (segment 0) reaches other tokens: their loss, {float(value):.7g}, is {float(poisoned):.7g}"
    require(np.isfinite(float(value)) and float(value) == float(poisoned), what)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(clean), strict=True):
        name = jax.tree_util.keystr(path)
        require(np.array_equal(np.asarray(a), np.asarray(b)), f"NaN in padding changes the gradient of {name}")


def law_5_implementations_agree(subject: Subject, t: int = LENGTH) -> None:
    """The backend that is chosen here and the reference give the same outputs and gradients."""
    x = inputs(t, b=1)

    def run(weights: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = nnx.merge(subject.graph, weights)(x, subject.with_source(Context(), 1))
        return jnp.sum(jnp.sin(out.hidden)), out.hidden

    def compiled() -> Callable[..., Any]:  # a function of its own for each backend, so that it is traced anew
        return jax.jit(jax.value_and_grad(lambda weights, x: run(weights, x), argnums=(0, 1), has_aux=True))

    (_, out), grads = compiled()(subject.weights, x)
    with preferred_backend("reference"):
        (_, expected), expected_grads = compiled()(subject.weights, x)
    require(out.shape == x.shape, f"{t} tokens: shape {out.shape} instead of {x.shape}")
    require(np.isfinite(np.asarray(out)).all(), f"{t} tokens: an output is not finite")
    require_close(out, expected, FP32, f"{t} tokens: differs from the reference backend")
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected_grads))
    for (path, grad), expected_grad in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        # Gradients that are zero in exact arithmetic (a key bias, say) are rounding in both.
        off, what = float(jnp.max(jnp.abs(grad - expected_grad))), f"the gradient of {jax.tree_util.keystr(path)}"
        require(
            off < 1e-4 * size,
            f"{t} tokens: {what} is off the reference backend's by {off:.1e}, the largest is {size:.1e}",
        )


def law_9_odd_lengths(subject: Subject) -> None:
    """Law 5 for one token, and for one more than a power of two."""
    for t in (1, 257):
        law_5_implementations_agree(subject, t)


def law_7_bf16(subject: Subject) -> None:
    """bf16 inputs give bf16 outputs, close to those of fp32. Inputs are exactly representable, so routers (fp32)
    choose alike; retrieval scores are products in bf16 and may flip, for one query in ten at most."""
    x = inputs(LENGTH, dtype=jnp.bfloat16)
    low = subject.call(x)
    require(low.dtype == jnp.bfloat16, f"bf16 inputs give outputs in {low.dtype}")
    high = subject.call(x.astype(jnp.float32))
    if getattr(subject.config, "retrieve", None) is None:
        require_close(low, high, BF16, "bf16 differs from fp32")
        return
    off = np.sqrt(np.mean((np.asarray(low, np.float32) - np.asarray(high)) ** 2, axis=-1))
    wrong = float((off > BF16 * float(jnp.sqrt(jnp.mean(high**2)))).mean())
    require(wrong < 0.1, f"{wrong:.0%} of queries retrieve other blocks in bf16; 10% may")


def law_15_noncausal(subject: Subject) -> None:
    """Outputs depend on the next input, and stay as they are under the mixer's symmetry: tokens in another order with
    their positions, or the sequence reversed."""
    x = inputs(LENGTH)
    base = subject.call(x)
    changed = float(jnp.abs(subject.call(x.at[:, 18].add(1.0)) - base)[:, 17].max())
    require(changed > 1e-4, f"output token 17 does not depend on input token 18: adding 1 to it changes {changed:.1g}")
    if subject.traits.symmetry is None:
        return
    order, context = np.arange(LENGTH)[::-1], Context()
    if subject.traits.symmetry == "permutation":
        order = np.random.default_rng(0).permutation(LENGTH)
        context = Context(positions=jnp.broadcast_to(jnp.asarray(order), (2, LENGTH)))
    what = f"tokens in another order (traits.symmetry is {subject.traits.symmetry}) have other outputs"
    require_close(subject.call(x[:, order], context), base[:, order], FP32, what)


def law_16_source(subject: Subject) -> None:
    """A document reads each of the source's tokens of its own segment number and no others, not even NaN in padding; it
    has the same outputs in packed rows and alone."""
    x, context = inputs(LENGTH), subject.with_source(Context(segments=jnp.asarray(DOCUMENTS)), 2)
    source, shape = context.source, SOURCE_DOCUMENTS.shape
    assert source is not None and source.hidden is not None, "not asked of mixers without a source"

    def call(hidden: jax.Array) -> np.ndarray:
        return np.asarray(subject.call(x, dataclasses.replace(context, source=Source(hidden, source.context))))

    base = call(source.hidden)
    poisoned = call(jnp.where(jnp.asarray(SOURCE_DOCUMENTS != 0)[..., None], source.hidden, jnp.nan))
    require(np.array_equal(base, poisoned), "NaN in the source's padding reaches an output")
    for token in (0, 9, 12, shape[1] - 1):
        off = np.abs(call(source.hidden.at[:, token].add(1.0)) - base).max(axis=-1)
        for row in range(2):
            segment = SOURCE_DOCUMENTS[row, token]
            reads = (DOCUMENTS[row] == segment) & (segment != 0)
            what = f"source token {token} of row {row}, segment {segment},"
            require((off[row][reads] > 1e-6).all(), f"{what} does not reach every token of its document")
            require((off[row][~reads] == 0).all(), f"{what} reaches a token of another document")
    alone = [np.zeros((2, length, WIDTH), np.float32) for length in (LENGTH, shape[1])]
    segments = [np.zeros((2, length), np.int32) for length in (LENGTH, shape[1])]
    of_document = [documents[0] == 2 for documents in (DOCUMENTS, SOURCE_DOCUMENTS)]
    for values, numbers, tokens, whole in zip(alone, segments, of_document, (x, source.hidden), strict=True):
        values[0, : tokens.sum()], numbers[0, : tokens.sum()] = np.asarray(whole)[0, tokens], 1
    read = Source(jnp.asarray(alone[1]), Context(segments=jnp.asarray(segments[1])))
    out = subject.call(jnp.asarray(alone[0]), Context(segments=jnp.asarray(segments[0]), source=read))
    what = "the document of segment 2 differs from the same tokens alone, with its source alone"
    require_close(base[:1, of_document[0]], out[:1, : of_document[0].sum()], FP32, what)


def law_14_maximum_length(subject: Subject) -> None:
    """Inputs longer than `traits.maximum_length` are refused with an error that names it."""
    limit = subject.traits.maximum_length
    assert limit is not None, "not asked of mixers without"
    require_refusal(lambda: subject.module(jnp.zeros((1, limit + 1, WIDTH))), str(limit))


LAWS: dict[str, Callable[[Subject], None]] = {
    function.__name__: function
    for function in (
        law_1_causal,
        law_3_packing,
        law_4_padding,
        law_5_implementations_agree,
        law_7_bf16,
        law_9_odd_lengths,
        law_14_maximum_length,
        law_15_noncausal,
        law_16_source,
    )
} | streaming_laws.LAWS
"""The laws of a mixer alone, by name."""

_STREAMS: tuple[Callable[[Traits], bool], str] = (lambda traits: traits.streams, "traits.streams is False")
_NO_SOURCE: tuple[Callable[[Traits], bool], str] = (lambda traits: not traits.cross, "traits.cross: law_16_source")
_IN_A_MODEL = ("law_8_sharded", "law_10_export_and_back", "law_13_members")
_ASKED: dict[str, tuple[Callable[[Traits], bool], str]] = {
    "law_1_causal": (lambda traits: traits.causal, "traits.causal is False"),
    **dict.fromkeys(streaming_laws.LAWS, _STREAMS),
    "law_14_maximum_length": (lambda traits: traits.maximum_length is not None, "traits.maximum_length is None"),
    "law_15_noncausal": (lambda traits: not (traits.causal or traits.cross), "traits.causal or traits.cross is True"),
    "law_16_source": (lambda traits: traits.cross, "traits.cross is False"),
    **dict.fromkeys(("law_3_packing", *_IN_A_MODEL), _NO_SOURCE),
}
"""Laws that only some mixers are held to: whether traits ask for one, and what they say if not."""

_TOKENS = {"law_6_state_size": 128, "law_8_sharded": 32, "law_9_odd_lengths": 257, "law_10_export_and_back": 21}
"""Tokens that a law gives to a mixer, where not `LENGTH`."""


def not_asked(law: str, traits: Traits) -> str | None:
    """Returns why a mixer of these traits is not held to a law; None where it is."""
    asked, reason = _ASKED.get(law, (lambda traits: True, ""))
    if not asked(traits):
        return reason
    limit, tokens = traits.maximum_length, _TOKENS.get(law, LENGTH)
    if limit is not None and limit < tokens and law != "law_14_maximum_length":
        return f"takes {tokens} tokens, and traits.maximum_length is {limit}"
    return None
