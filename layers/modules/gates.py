"""Gates of outputs and of what is written, and what stands around them: low-rank and block-diagonal maps, skips, norms
of heads, token shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.modules.linear import Initializer, Linear, matrix_init, merge_heads, normal, parameter

GateActivation = Literal["silu", "sigmoid", "none"]
HeadNorm = Literal["head", "all", "group"]

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "none": lambda x: x,
}
"""Activations by name."""


def in_fp32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x in fp32; fp64 stays, by which equations are tested."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit(x: Float[Array, "*rows k"], epsilon: float = 1e-6) -> Float[Array, "*rows k"]:
    """Returns x / sqrt(sum x^2 + epsilon) over the last axis, computed in fp32."""
    y = in_fp32(x)
    return (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class LowRank(nnx.Module):
    """W2 activation(W1 x) + bias, W1 (d, rank), W2 (rank, outputs)."""

    def __init__(
        self,
        width: int,
        rank: int,
        outputs: int,
        dims: str,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        activation: Literal["none", "tanh", "sigmoid"] = "none",
        inits: tuple[Initializer, Initializer] = (matrix_init, matrix_init),
    ):
        self.down = Linear(width, rank, "d u", rngs, init=inits[0])
        self.up = Linear(rank, outputs, f"u {dims}", rngs, bias=bias, init=inits[1])
        self.activation = activation

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows o"]:
        return self.up(ACTIVATIONS[self.activation](self.down(x)))


class Strength(nnx.Module):
    """beta = sigmoid(W x) per head, or twice that: the share of what a key stores that a delta rule replaces. Above 1
    it overshoots, and a transition I - beta k k^T has a negative eigenvalue (Grazzi et al. 2024)."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, *, largest: float = 1.0):
        self.projection = Linear(width, heads, "d h", rngs)
        self.largest = largest

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h"]:
        """Returns beta, fp32."""
        return self.largest * jax.nn.sigmoid(in_fp32(self.projection(x)))


class Skip(nnx.Module):
    """o + D v, with a number D per head, 1 at the start (Mamba)."""

    def __init__(self, heads: int, value: float = 1.0):
        self.weight = parameter(jnp.full(heads, value), "h", decay=False)

    def __call__(self, o: Float[Array, "b t h v"], v: Float[Array, "b t h v"]) -> Float[Array, "b t h v"]:
        return o + (self.weight[...][:, None] * v).astype(o.dtype)


class HeadNormalization(nnx.Module):
    """Norm of the heads' vectors. "head": RMS, one gain (v,) for all heads; "all": RMS over all heads together, gain
    (h, v); "group": mean and variance per head, gain and bias (h, v)."""

    def __init__(self, heads: int, dim: int, kind: HeadNorm = "head", epsilon: float = 1e-5, *, gain: bool = True):
        shape, dims = ((dim,), "v") if kind == "head" else ((heads, dim), "h v")
        self.kind = kind
        self.epsilon = epsilon
        self.gain = parameter(jnp.ones(shape), dims, decay=False) if gain else None
        self.bias = parameter(jnp.zeros((heads, dim)), "h v", decay=False) if kind == "group" else None

    def __call__(self, x: Float[Array, "b t h v"]) -> Float[Array, "b t h v"]:
        y = in_fp32(x)
        axes = (-2, -1) if self.kind == "all" else -1
        if self.kind == "group":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + self.epsilon)
        y = y if self.gain is None else y * self.gain[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class OutputGate(nnx.Module):
    """norm(o) * activation(W x), or norm(o * activation(W x)), before a mixer's last projection.

    Args:
      projection: W; to all channels of o, or to one number per head; None: no gate, norm(o).
      norm: module on (b, t, h, v), or None.
      gate_first: the norm comes after the gate (Mamba-2).
    """

    def __init__(
        self,
        projection: nnx.Module | None,
        *,
        activation: GateActivation = "silu",
        norm: nnx.Module | None = None,
        gate_first: bool = False,
    ):
        self.projection = projection
        self.activation = activation
        self.norm = norm
        self.gate_first = gate_first

    def __call__(self, o: Float[Array, "b t h v"], x: Float[Array, "b t d"]) -> Float[Array, "b t hv"]:
        """Returns the gated outputs of all heads in one dimension, in x's dtype."""
        o = o.astype(x.dtype)
        norm = self.norm or (lambda y: y)
        if self.projection is None:
            return merge_heads(norm(o))
        gate = ACTIVATIONS[self.activation](self.projection(x)).reshape(*o.shape[:3], -1)
        return merge_heads(norm(o * gate) if self.gate_first else norm(o) * gate)


class Interpolation(nnx.Module):
    """x + (previous - x) * mix per channel: RWKV's token shift."""

    def __init__(self, mix: Float[Array, " d"]):
        self.mix = parameter(mix, "d", decay=False)

    def __call__(self, x: Float[Array, "b t d"], previous: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return x + (previous - x) * self.mix[...].astype(x.dtype)


class BlockDiagonal(nnx.Module):
    """W x + b, with a block of W per head."""

    def __init__(self, channels: int, heads: int, rngs: nnx.Rngs):
        dim = channels // heads
        init = normal(dim**-0.5)
        self.kernel = parameter(init(rngs.params(), (heads, dim, dim), jnp.float32), "h k v")
        self.bias = parameter(jnp.zeros(channels), "f")

    def __call__(self, x: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
        heads = x.reshape(*x.shape[:2], self.kernel.shape[0], -1)
        y = jnp.einsum("bthk,hkv->bthv", heads, self.kernel[...].astype(x.dtype))
        return y.reshape(x.shape) + self.bias[...].astype(x.dtype)
