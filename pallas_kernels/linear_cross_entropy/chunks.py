"""Chunks of targets, one after another: the logits of one chunk are all that is in memory, and gradients are made
from them there."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from recollect.pallas_kernels.dispatch import free_axes

CHUNK = 2**26
"""Logits of a chunk: 256 MiB in fp32. Each chunk reads and writes the kernel's gradient, 8 bytes against 6 FLOPs a
target, so that it takes some 400 targets until an H100's or a TPU's matrix units are what limits; a vocabulary of
50,000 gets 1,024."""


def chunk_of(targets: int, vocabulary: int) -> int:
    """Targets of a chunk: a power of two from 256 to 8,192 whose logits fit, or all."""
    fitting = max(CHUNK // vocabulary, 1)
    return min(targets, max(256, min(8192, 1 << (fitting.bit_length() - 1))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked(hidden, kernel, targets, weights, z_loss: float, chunk: int | None):
    """Returns total, loss, lse and correct; arguments as those of the public function."""
    return _over_mesh(hidden, kernel, targets, weights, z_loss, chunk, False)[0]


def _forward(hidden, kernel, targets, weights, z_loss, chunk):
    values, gradients = _over_mesh(hidden, kernel, targets, weights, z_loss, chunk, True)
    _, loss, lse, _ = values
    # The gradient of the total by a target's weight is that target's part.
    return values, (
        *gradients,
        loss + z_loss * lse * lse,
        jnp.zeros((0,), kernel.dtype),
        jnp.zeros((0,), weights.dtype),
    )


def _backward(z_loss, chunk, kept, cotangents):
    d_hidden, d_kernel, d_weights, kernel, weights = kept
    cotangent = cotangents[0]
    return (
        (d_hidden * cotangent).astype(d_hidden.dtype),
        (d_kernel * cotangent).astype(kernel.dtype),
        None,
        (d_weights * cotangent).astype(weights.dtype),
    )


chunked.defvjp(_forward, _backward)


def _over_mesh(hidden, kernel, targets, weights, z_loss: float, chunk: int | None, with_gradients: bool) -> Any:
    """`_all_chunks`, each device of the ambient mesh on its own targets. Devices of tensor axes, which hold the same
    hidden vectors, take different targets, so that none repeats another's work."""
    free = {name: size for name, size in free_axes().items() if size > 1}
    rows, columns = (
        _dividing(hidden.shape[0], ("data", "fsdp"), free),
        _dividing(hidden.shape[1], ("sequence", "tensor"), free),
    )
    used = rows + columns
    run = functools.partial(_all_chunks, z_loss=z_loss, chunk=chunk, with_gradients=with_gradients)
    if not used:
        return run(hidden, kernel.astype(hidden.dtype), targets, weights)
    # Parameters are split over fsdp and tensor: the kernel is gathered here, in hidden's dtype, and its gradient
    # scattered.
    split = {
        axis: index
        for index, axis in enumerate(("fsdp", "tensor"))
        if axis in used and kernel.shape[index] % free[axis] == 0
    }

    def part(hidden, kernel, targets, weights):
        kernel = kernel.astype(hidden.dtype)
        for axis, index in split.items():
            kernel = jax.lax.all_gather(kernel, axis, axis=index, tiled=True)
        (total, *rest), gradients = run(hidden, kernel, targets, weights)
        if gradients:
            d_hidden, d_kernel = gradients
            for axis, index in split.items():
                d_kernel = jax.lax.psum_scatter(d_kernel, axis, scatter_dimension=index, tiled=True)
            others = tuple(axis for axis in used if axis not in split)
            gradients = (d_hidden, jax.lax.psum(d_kernel, others) if others else d_kernel)
        return (jax.lax.psum(total, used), *rest), gradients

    place = PartitionSpec(rows or None, columns or None)
    placed_kernel = PartitionSpec(*(axis if axis in split else None for axis in ("fsdp", "tensor")))
    gradients = (place, placed_kernel) if with_gradients else ()
    return jax.shard_map(
        part,
        in_specs=(place, placed_kernel, place, place),
        out_specs=((PartitionSpec(), place, place, place), gradients),
        axis_names=set(free),
        check_vma=False,  # the sums over devices are made by hand, in both directions
    )(hidden, kernel, targets, weights)


def _dividing(size: int, axes: tuple[str, ...], free: Mapping[str, int]) -> tuple[str, ...]:
    """Returns as many of these mesh axes, in order, as divide a dimension."""
    used: tuple[str, ...] = ()
    parts = 1
    for axis in axes:
        if axis in free and size % (parts * free[axis]) == 0:
            used, parts = (*used, axis), parts * free[axis]
    return used


def _all_chunks(hidden, kernel, targets, weights, *, z_loss: float, chunk: int | None, with_gradients: bool) -> Any:
    """(total, loss, lse, correct), and (d_hidden, d_kernel in fp32) of the total, or ()."""
    b, t = targets.shape
    count = b * t
    wanted = min(count, chunk or chunk_of(count, kernel.shape[1]))
    chunks = -(-count // wanted)
    size = -(-count // chunks)
    padding = chunks * size - count

    def split(x: jax.Array) -> jax.Array:
        flat = x.reshape(count, *x.shape[2:])
        return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)).reshape(chunks, size, *x.shape[2:])

    def body(d_kernel: Any, chunk: Any) -> Any:
        hidden, targets, weights = chunk
        values, gradients = _one_chunk(hidden, targets, weights, kernel, z_loss, with_gradients)
        d_hidden, d_kernel_of_chunk = gradients if with_gradients else (None, None)
        return (d_kernel + d_kernel_of_chunk if with_gradients else None), (values, d_hidden)

    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    start = jnp.zeros(kernel.shape, wide) if with_gradients else None
    d_kernel, ((penalised, *rest), d_hidden) = jax.lax.scan(body, start, tuple(map(split, (hidden, targets, weights))))

    def joined(x: jax.Array) -> jax.Array:
        return x.reshape(chunks * size, *x.shape[2:])[:count].reshape(b, t, *x.shape[2:])

    values = (jnp.sum(penalised), *map(joined, rest))
    return values, ((joined(d_hidden), d_kernel) if with_gradients else ())


def _one_chunk(hidden, targets, weights, kernel, z_loss: float, with_gradients: bool) -> Any:
    """Weighted losses, losses, log-sum-exps and correctness (c,) of a chunk, and the gradients of its total: (c, d),
    (d, v)."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.matmul(hidden, kernel, preferred_element_type=wide)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    loss = lse - chosen
    correct = jnp.sum(logits >= chosen, axis=-1) == 1
    weights = weights[:, None].astype(wide)
    penalised = weights * (loss + z_loss * lse * lse)
    values = (penalised[:, 0], loss[:, 0], lse[:, 0], correct)
    if not with_gradients:
        return values, ()
    # d total / d logit = w ((1 + 2 z lse) softmax - [is the target])
    is_target = jnp.arange(kernel.shape[1])[None] == targets[:, None]
    d_logits = weights * (jnp.exp(logits - lse) * (1 + 2 * z_loss * lse) - is_target)
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.matmul(d_logits, kernel.T, preferred_element_type=wide).astype(hidden.dtype)
    return values, (d_hidden, jnp.matmul(hidden.T, d_logits, preferred_element_type=wide))
