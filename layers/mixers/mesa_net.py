"""MesaNet: reads the linear map from keys to values that fits all pairs so far best.

    H_t = g_t H_{t-1} + beta_t k_t k_t^T,   G_t = g_t G_{t-1} + beta_t k_t v_t^T   per head
    o_t = G_t^T (H_t + Diag(lambda))^-1 q_t
    q, k = unit(silu(conv(W x))),   v = W_v x,   y = W_o norm(o)
    g = sigmoid(W_g x + b_g),   beta = sigmoid(W_b x + b_b)

lambda = softplus(p) + 1/4 per head and channel of the key. von Oswald et al. 2025 (2506.05233); initial values as in
flash-linear-attention (mesa_net.py): lambda at 1. The system is solved by conjugate gradients whose products H_t x_t
are recurrences, k in place of v; its gradient is one more solution of it. Published: 128 dimensions per head, 30 steps.
State: (k x k) and (k x v) fp32 per head, kernel - 1 inputs of each convolution.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.mixer import Place
from recollect.layers.modules import (
    HeadNormalization,
    Linear,
    LogSigmoidDecay,
    in_fp32,
    inverse_softplus,
    merge_heads,
    parameter,
    unit,
)
from recollect.layers.modules.short_convolution import has_taps
from recollect.layers.recurrent import RecurrentConfig, RecurrentMixer, Stream
from recollect.pallas_kernels.linear_recurrence import Recurrence, run_recurrence

SMALLEST = 0.25
"""Lower bound of lambda."""


@chz.chz(typecheck=True)
class MesaNet(RecurrentConfig):
    """MesaNet.

    Attributes:
      kernel: taps of the convolutions of queries and keys; None leaves them out.
      steps: of conjugate gradients, the same for training and decoding.
    """

    kernel: int | None = chz.field(default=4, validator=has_taps)
    steps: int = chz.field(default=30, validator=at_least(1))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> MesaNetMixer:
        return self.in_each_direction(MesaNetMixer, width, place, rngs)


class MesaNetMixer(RecurrentMixer):
    """The module of `MesaNet`."""

    def __init__(self, config: MesaNet, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width), kernel=config.kernel)
        self.convolutions.pop("value", None)
        _, h, k, v = self.sizes
        self.decay = LogSigmoidDecay(Linear(width, h, "d h", rngs, bias=True), h)
        self.strength = Linear(width, h, "d h", rngs, bias=True)
        self.ridge = parameter(jnp.full((h, k), inverse_softplus(jnp.asarray(1 - SMALLEST))), "h k", decay=False)
        self.norm = HeadNormalization(h, v)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = self.heads(x, stream)
        q, k = (jax.nn.silu(y) if "query" not in self.convolutions else y for y in (q, k))
        q, k = unit(in_fp32(q)), unit(in_fp32(k))
        gates = {"log_decay": self.decay(x)[..., 0], "write_strength": jax.nn.sigmoid(in_fp32(self.strength(x)))}
        ridge = jax.nn.softplus(self.ridge[...].astype(q.dtype)) + SMALLEST
        zeros = jax.ShapeDtypeStruct((x.shape[0], *k.shape[2:], k.shape[3]), jnp.float32)
        q = stream.run("key_map", zeros, fitted_queries, q, k, ridge, self.config.steps, **gates)
        o = stream.recurrence(q, k, v, name="value_map", **gates)
        return self.output(merge_heads(self.norm(o)))


def fitted_queries(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    ridge: Float[Array, "h k"],
    steps: int,
    *,
    return_state: bool = False,
    **operands: Any,
) -> tuple[Float[Array, "b t h k"], Float[Array, "b h k k"] | None]:
    """Returns (H_t + Diag(ridge))^-1 q_t at every token, by `steps` of conjugate gradients, and H after the last.

    `operands` are arguments of `linear_recurrence`, of which H is the state.
    """
    products = Recurrence(q, k, k, **operands)
    solved = _solve(steps, (products, ridge), q)
    return solved, run_recurrence(products, return_state=True)[1] if return_state else None


def _product(system: tuple[Recurrence, jax.Array], x: jax.Array) -> jax.Array:
    products, ridge = system
    return run_recurrence(dataclasses.replace(products, q=x))[0] + ridge * x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(steps: int, system: tuple[Recurrence, jax.Array], right: jax.Array) -> jax.Array:
    """Conjugate gradients (Hestenes & Stiefel 1952) from 0, one system per token and head."""

    def dot(x, y):
        return jnp.sum(x * y, axis=-1, keepdims=True)

    limits = jnp.finfo(right.dtype)
    solved = limits.eps**2 * dot(right, right) + 1e3 * limits.tiny

    def step(carry, _):
        x, residual, direction, size = carry
        product = _product(system, direction)
        # Nothing changes where rounding is all that is left, or there is nothing to solve, as at padding.
        goes_on = size > solved
        length = jnp.where(goes_on, size, 0) / jnp.where(goes_on, dot(direction, product), 1)
        x, residual = x + length * direction, residual - length * product
        now = dot(residual, residual)
        return (x, residual, residual + now / jnp.where(goes_on, size, 1) * direction, now), None

    first = (jnp.zeros_like(right), right, right, dot(right, right))
    return jax.lax.scan(step, first, length=steps)[0][0]


def _forward(steps, system, right):
    solved = _solve(steps, system, right)
    return solved, (system, solved)


def _backward(steps, kept, gradient):
    """x = A^-1 r has dr = A^-1 dx, and dA is that of -dr . (A x): A is symmetric."""
    system, solved = kept
    right = _solve(steps, system, gradient)
    return jax.vjp(lambda system: _product(system, solved), system)[1](-right)[0], right


_solve.defvjp(_forward, _backward)
