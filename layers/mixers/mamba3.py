"""Mamba-3 (one input, one output): a state space model by the trapezoidal rule, whose states turn as they decay.

    S_t = a_t S_{t-1} + (1 - lambda_t) dt_t a_t k_{t-1} v_{t-1}^T + lambda_t dt_t k_t v_t^T,   y_t = S_t^T q_t + D v_t
    a_t = exp(A_t dt_t),   A_t = -max(softplus(W_A u), 1e-4),   dt_t = softplus(W_dt u + step_bias),
    lambda_t = sigmoid(W_lambda u)                                                              per head
    q, k = rotated(norm(W_C u) + bias_C), rotated(norm(W_B u) + bias_B) in pairs of dimensions, by angles
    phase_t = phase_{t-1} + pi tanh(W_theta u) dt_t;    out = W_o (y * silu(W_z u)),   v = W_x u

Lahoti et al. 2026, "Mamba-3", section 3, and the authors' code (state-spaces/mamba): no convolution; q and k are shared
by the heads of a group up to biases, which start at 1, and phases; half of the dimensions turn; width of v twice the
model's; steps start log-uniform on (0.001, 0.1), D at 1; projections as torch's.

Here S_t = T_t + lambda_t dt_t k_t v_t^T: T is one recurrence on the keys and values of the token before, which are
written once for both tokens,

    T_t = a_t (T_{t-1} + (lambda_{t-1} dt_{t-1} + (1 - lambda_t) dt_t) k_{t-1} v_{t-1}^T).

State: T, the last k and v, what is left to write of them, and phases.
"""

from __future__ import annotations

import math
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import UserError, at_least, requires
from recollect.layers.mixer import Place
from recollect.layers.modules import (
    HeadNormalization,
    Linear,
    OutputGate,
    Skip,
    in_fp32,
    inverse_softplus,
    parameter,
    spread_uniform,
    torch_uniform,
)
from recollect.layers.recurrent import HeadSizes, RecurrentConfig, RecurrentMixer, Stream
from recollect.pallas_kernels.linear_recurrence.recurrence import repeat_heads
from recollect.pallas_kernels.linear_scan import linear_scan


@chz.chz(typecheck=True)
class Mamba3(RecurrentConfig):
    """Mamba-3.

    Attributes:
      key_heads: groups, each with its B and C.
      key_dim: state dimensions, those of B and C.
      value_dim: dimensions of v per head; None: 2 width // heads.
      turning: share of the state's dimensions that turn.
    """

    heads: int = chz.field(default=4, validator=at_least(1))
    key_heads: int = chz.field(default=1, validator=at_least(1))
    key_dim: int = chz.field(default=64, validator=at_least(2))
    turning: float = chz.field(default=0.5, validator=requires(lambda value: 0 < value <= 1, "must be in (0, 1]"))

    def sizes(self, width: int) -> HeadSizes:
        return super().sizes(width)._replace(value_dim=self.value_dim or 2 * self.share(width))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> Mamba3Mixer:
        if int(self.key_dim * self.turning) < 2:
            raise UserError(f"turning={self.turning}: no pair of the key_dim={self.key_dim} state dimensions turns")
        return self.in_each_direction(Mamba3Mixer, width, place, rngs)


class Mamba3Mixer(RecurrentMixer):
    """The module of `Mamba3`."""

    def __init__(self, config: Mamba3, width: int, place: Place, rngs: nnx.Rngs):
        inits = dict.fromkeys(("query", "key", "value"), torch_uniform())
        inits["output"] = torch_uniform(place.depth**-0.5)
        super().__init__(config, width, place, rngs, config.sizes(width), inits=inits)
        _, h, k, v = self.sizes
        self.query_norm, self.key_norm = HeadNormalization(1, k), HeadNormalization(1, k)
        self.query_bias, self.key_bias = (parameter(jnp.ones((h, k)), "h k", decay=False) for _ in range(2))
        self.rate, self.step, self.share = (Linear(width, h, "d h", rngs, init=torch_uniform()) for _ in range(3))
        step = jnp.exp(spread_uniform(rngs.params(), (h,), math.log(1e-3), math.log(0.1)))
        self.step_bias = parameter(inverse_softplus(step), "h", decay=False)
        self.angle = Linear(width, int(k * config.turning) // 2, "d k", rngs, init=torch_uniform())
        self.skip = Skip(h)
        self.gate = OutputGate(Linear(width, h * v, "d hv", rngs, init=torch_uniform()))

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = self.heads(x, stream)
        rate, step, share, angle = (in_fp32(map(x)) for map in (self.rate, self.step, self.share, self.angle))
        step, share = jax.nn.softplus(step + self.step_bias[...]), jax.nn.sigmoid(share)
        log_decay = -jnp.maximum(jax.nn.softplus(rate), 1e-4) * step

        turn = step[..., None] * (jnp.pi * jnp.tanh(angle))[:, :, None]
        zeros = jax.ShapeDtypeStruct((x.shape[0], turn.shape[2] * turn.shape[3]), jnp.float32)
        phase = stream.run("phase", zeros, phases, turn.reshape(*x.shape[:2], -1)).reshape(turn.shape)
        q, k = (
            rotated(in_fp32(repeat_heads(norm(y), v.shape[2])) + bias[...], phase).astype(x.dtype)
            for y, norm, bias in ((q, self.query_norm, self.query_bias), (k, self.key_norm, self.key_bias))
        )
        now = share * step
        last = {"left": now, "key": k, "value": v}
        left, keys, values = (stream.previous(y, name=f"last_{name}") for name, y in last.items())
        write = jnp.exp(log_decay) * (left + (1 - share) * step)
        o = stream.recurrence(q, keys, values, log_decay=log_decay, write_strength=write)
        read = now[..., None] * jnp.sum(in_fp32(q) * in_fp32(k), axis=-1, keepdims=True)
        return self.output(self.gate(self.skip(o + (read * v).astype(o.dtype), v), x))


def rotated(x: Float[Array, "b t h k"], phase: Float[Array, "b t h n"]) -> Float[Array, "b t h k"]:
    """Returns x whose first 2 n dimensions are rotated, neighbours in pairs, by angles."""
    turning, rest = jnp.split(x, [2 * phase.shape[-1]], axis=-1)
    a, b, cos, sin = turning[..., 0::2], turning[..., 1::2], jnp.cos(phase), jnp.sin(phase)
    pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return jnp.concatenate([pairs.reshape(turning.shape), rest], axis=-1)


def phases(
    turn: Float[Array, "b t f"], *, segment_ids: Int[Array, "b t"] | None = None, **stream: Any
) -> tuple[Float[Array, "b t f"], Float[Array, "b f"] | None]:
    """Returns sums of angles within each document, and the last ones modulo a turn, so that they stay exact in long
    streams; `stream` as in `linear_scan`."""
    sums, last = linear_scan(jnp.ones_like(turn), turn, segment_ids=segment_ids, **stream)
    return sums, last if last is None else last - 2 * jnp.pi * jnp.round(last / (2 * jnp.pi))
