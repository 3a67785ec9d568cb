"""What the kernels of the short convolution share: everything around the pass over the tokens.

A kernel is two functions, `forward` and `backward`, on rows whose documents have no holes. Here stand the operation's
gradient (`jax.custom_vjp`), the masks as one integer a token, padding inside documents, the state that comes out and
the gradient of the one that goes in (both touch k - 1 tokens a row).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.chunking import compaction, permuted, taken

MAXIMUM_TAPS = 8
BIAS_ROW = 8
WEIGHT_ROWS = 16
EDGE = 8  # rows of the state as kernels take it, zeros first: a sublane tile on a TPU


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """What a kernel reads; absent ones are None.

    Attributes:
      x: (b, t, d).
      in_gate, out_gate: (b, t, d).
      weights: (16, d) fp32: rows 0 to k - 1 the taps, row 8 the bias, zeros.
      state: (b, 8, d) fp32, the inputs before the row, the newest last.
      links: (b, t) int32: how many of the tokens just before a token its taps reach, plus 16 times how many of those
        just after it reach it; -1 at padding. None is one document.
    """

    x: jax.Array
    in_gate: jax.Array | None
    out_gate: jax.Array | None
    weights: jax.Array
    state: jax.Array
    links: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Gradients:
    """What a backward kernel writes.

    Attributes:
      x, in_gate, out_gate: as the operands.
      weights: (parts, 16, d) fp32, to be summed over the parts.
      first: (b, 8, d) fp32, gradients before the activation of the first 8 tokens (zeros past the end).
    """

    x: jax.Array
    in_gate: jax.Array | None
    out_gate: jax.Array | None
    weights: jax.Array
    first: jax.Array


@dataclasses.dataclass(frozen=True)
class ShortKernel:
    """forward(operands, taps, activation) gives y (b, t, d) in x's dtype; backward(operands, dy, taps, activation)
    the gradients."""

    forward: Callable[[Operands, int, str], jax.Array]
    backward: Callable[[Operands, jax.Array, int, str], Gradients]


def short_convolution(
    kernel: ShortKernel,
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array | None,
    *,
    in_gate: jax.Array | None,
    out_gate: jax.Array | None,
    activation: str,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    return_state: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """See recollect.pallas_kernels.gated_convolution."""
    b, _, d = x.shape
    k = taps.shape[0]
    weights = jnp.zeros((WEIGHT_ROWS, d), jnp.float32).at[:k].set(taps.astype(jnp.float32))
    if bias is not None:
        weights = weights.at[BIAS_ROW].set(bias.astype(jnp.float32))
    state = jnp.zeros((b, EDGE, d), jnp.float32)
    if initial_state is not None and k > 1:
        state = state.at[:, EDGE - (k - 1) :].set(initial_state.astype(jnp.float32))
    old_segment = None
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        old_segment = jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment.astype(jnp.int32)

    def convolved(x, in_gate, out_gate, segments):
        links = None if segments is None else document_links(segments, old_segment, k)
        return _convolved(kernel, k, activation, Operands(x, in_gate, out_gate, weights, state, links))

    if segment_ids is None:
        y = convolved(x, in_gate, out_gate, None)
    else:
        # Only padding before valid tokens can lie inside a document. Moving tokens costs several passes: rows packed
        # without gaps skip it.
        gaps = jnp.any((segment_ids[:, 1:] != 0) & (segment_ids[:, :-1] == 0))

        def moved(x, in_gate, out_gate, segments):
            order, place = compaction(segments)
            x, in_gate, out_gate = (
                None if part is None else permuted(part, order, place) for part in (x, in_gate, out_gate)
            )
            return permuted(convolved(x, in_gate, out_gate, taken(segments, order)), place, order)

        y = jax.lax.cond(gaps, moved, convolved, x, in_gate, out_gate, segment_ids)
    if not return_state:
        return y, None
    state_dtype = x.dtype if initial_state is None else initial_state.dtype
    return y, final_state(x, in_gate, state, segment_ids, old_segment, k).astype(state_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _convolved(kernel: ShortKernel, taps: int, activation: str, operands: Operands) -> jax.Array:
    return kernel.forward(operands, taps, activation)


def _forward(kernel: ShortKernel, taps: int, activation: str, operands: Operands) -> tuple[jax.Array, Operands]:
    return kernel.forward(operands, taps, activation), operands


def _backward(kernel: ShortKernel, taps: int, activation: str, operands: Operands, dy: jax.Array) -> tuple[Operands]:
    gradients = kernel.backward(operands, dy, taps, activation)
    state = _state_gradient(gradients.first, operands, taps)
    return (
        Operands(gradients.x, gradients.in_gate, gradients.out_gate, jnp.sum(gradients.weights, axis=0), state, None),
    )


_convolved.defvjp(_forward, _backward)


def _state_gradient(first: jax.Array, operands: Operands, taps: int) -> jax.Array:
    """(b, 8, d): each of the first tokens reaches back by its taps."""
    reached = None
    if operands.links is not None:
        links = operands.links[:, :EDGE]
        links = jnp.pad(links, ((0, 0), (0, EDGE - links.shape[1])), constant_values=-1)
        reached = jnp.where(links < 0, -1, links & 15)[:, :, None]
    state = jnp.zeros_like(first)
    for lag in range(1, taps):
        part = first[:, :lag] if reached is None else jnp.where(reached[:, :lag] >= lag, first[:, :lag], 0)
        state = state.at[:, EDGE - lag :].add(operands.weights[lag] * part)
    return state


def document_links(segments: jax.Array, old_segment: jax.Array | None, taps: int) -> jax.Array:
    """`Operands.links` of segments (b, t) whose documents have no holes; `old_segment` (b,) owns the state, 0
    nobody."""
    b, t = segments.shape
    past = taps - 1
    old = jnp.zeros(b, segments.dtype) if old_segment is None else old_segment
    around = jnp.concatenate(
        [jnp.broadcast_to(old[:, None], (b, past)), segments, jnp.zeros((b, past), segments.dtype)], axis=1
    )

    def run(step: int) -> jax.Array:
        together = jnp.ones((b, t), bool)
        length = jnp.zeros((b, t), jnp.int32)
        for lag in range(1, past + 1):
            together &= jax.lax.slice_in_dim(around, past + step * lag, past + step * lag + t, axis=1) == segments
            length += together
        return length

    return jnp.where(segments == 0, -1, run(-1) + 16 * run(1))


def final_state(x, in_gate, state, segments, old_segment, taps: int) -> jax.Array:
    """The newest k - 1 valid inputs (b, k - 1, d) in fp32, zeros where they are of another document than the newest."""
    b, t, d = x.shape
    past = taps - 1
    if past == 0:
        return jnp.zeros((b, 0, d), jnp.float32)
    valid = jnp.ones((b, t), bool) if segments is None else segments != 0
    rank = jnp.cumsum(valid, axis=1) - 1
    wanted = rank[:, -1:] + 1 + jnp.arange(-past, 0)
    # Without holes the rank is the place.
    place = wanted if segments is None else jnp.argmax(valid[:, None] & (rank[:, None] == wanted[:, :, None]), axis=2)
    place = jnp.where(wanted >= 0, place, 0)
    new = _inputs_at(x, in_gate, place, wanted >= 0)
    old_place = jnp.clip(wanted + past, 0, past - 1)
    old = jnp.take_along_axis(state[:, EDGE - past :], old_place[:, :, None], axis=1)
    newest = jnp.where((wanted >= 0)[:, :, None], new, old)
    if segments is None:
        return newest
    owners = jnp.where(wanted >= 0, jnp.take_along_axis(segments, place, axis=1), old_segment[:, None])
    return jnp.where((owners == owners[:, -1:])[:, :, None], newest, 0)


def _inputs_at(x, in_gate, place, known) -> jax.Array:
    def at(values):  # masked before the product: a place that is not known may be padding, which holds anything
        return jnp.where(known[:, :, None], taken(values, place), 0).astype(jnp.float32)

    return at(x) if in_gate is None else at(x) * at(in_gate)
