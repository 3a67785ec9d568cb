"""mLSTM: a matrix memory with exponential input gates and a normaliser (xLSTM).

    C_t = f_t C_{t-1} + i_t k_t v_t^T,   n_t = f_t n_{t-1} + i_t k_t,   h_t = C_t^T q_t / max(|n_t . q_t|, 1)   per head
    i_t = exp(cap(W_i x_t + b_i)),   f_t = sigmoid(cap(W_f x_t + b_f)),   cap(z) = 15 tanh(z / 15)
    y = W_o [norm(h) * sigmoid(W_g x)],   q is divided by sqrt(k)

Beck et al. 2024, equations 19 to 27, in the form of xLSTM 7B (Beck et al. 2025, section 3): keys half as wide as
values, gates capped, a norm per head, no convolution. C and n are kept divided by exp(m_t), m_t = max(log f_t +
m_{t-1}, log i_t), which changes no output; then the 1 is exp(-m_t). n is a column of ones beside the values. Gates
start at W = 0, b_f spread from 3 to 6 over heads, b_i normal with deviation 0.1. State: k (v + 1) + 1 fp32 per head.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least, requires
from recollect.layers.mixer import Place
from recollect.layers.modules import HeadNormalization, Linear, OutputGate, in_fp32, parameter, running_maximum
from recollect.layers.modules.initial_values import zeros
from recollect.layers.recurrent import HeadSizes, RecurrentConfig, RecurrentMixer, Stream


@chz.chz(typecheck=True)
class MLSTM(RecurrentConfig):
    """mLSTM.

    Attributes:
      key_dim: None: width // (2 heads).
      cap: largest size of a gate's logit; None for any.
    """

    heads: int = chz.field(default=4, validator=at_least(1))
    cap: float | None = chz.field(default=15.0, validator=requires(lambda value: value > 0, "must be positive"))

    def sizes(self, width: int) -> HeadSizes:
        return super().sizes(width)._replace(key_dim=self.key_dim or max(1, self.share(width) // 2))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> MLSTMMixer:
        return self.in_each_direction(MLSTMMixer, width, place, rngs)


class MLSTMMixer(RecurrentMixer):
    """The module of `MLSTM`."""

    def __init__(self, config: MLSTM, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width))
        _, h, _, v = self.sizes
        self.input_gate = Linear(width, h, "d h", rngs, bias=True, init=zeros)
        self.forget_gate = Linear(width, h, "d h", rngs, bias=True, init=zeros)
        self.input_gate.bias = parameter(0.1 * jax.random.normal(rngs.params(), (h,)), "h")
        self.forget_gate.bias = parameter(jnp.linspace(3.0, 6.0, h), "h")
        projection = Linear(width, h * v, "d hv", rngs)
        self.gate = OutputGate(projection, activation="sigmoid", norm=HeadNormalization(h, v))

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = self.heads(x, stream)
        log_input = self._capped(self.input_gate(x))
        log_forget = jax.nn.log_sigmoid(self._capped(self.forget_gate(x)))
        before, after = self._stabiliser(log_forget, log_input, stream)
        # m_t is at least log f_t + m_{t-1}, and at least log i_t: neither exponential is above 1.
        o = stream.recurrence(
            q,
            k,
            jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1),
            log_decay=log_forget + before - after,
            write_strength=jnp.exp(log_input - after),
            scale=k.shape[3] ** -0.5,
        )
        o = in_fp32(o)
        o = o[..., :-1] / jnp.maximum(jnp.abs(o[..., -1:]), jnp.exp(-after)[..., None])
        return self.output(self.gate(o, x))

    def _capped(self, logits: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        logits, cap = in_fp32(logits), self.config.cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _stabiliser(self, log_forget, log_input, stream: Stream):
        """m before and after each token (b, t, h). No output depends on it, so that its gradient is zero."""
        gates = jax.lax.stop_gradient((log_forget, log_input))
        shape = jax.ShapeDtypeStruct((log_input.shape[0], log_input.shape[2]), jnp.float32)
        return stream.run("stabiliser", shape, running_maximum, *gates)
