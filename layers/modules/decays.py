"""Decays of recurrences: constants per head, Mamba's step sizes, gates by a sigmoid and their lower bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from recollect.layers.mixer import Place
from recollect.layers.modules.gates import in_fp32
from recollect.layers.modules.linear import parameter


def retnet_log_decays(heads: int) -> Float[Array, " h"]:
    """Returns log(1 - 2^(-5-h)), h = 0, 1, ... (Sun et al. 2023, equation 8)."""
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads, dtype=float))))


def alibi_slopes(heads: int) -> Sequence[float]:
    """Returns 2^(-8 h / heads), h = 1, 2, ...; where heads is no power of two, those of the power below and every other
    one of the power above (Press, Smith & Lewis 2021, section 3, and their code)."""
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * h / below) for h in range(1, below + 1)]
    between = [2.0 ** (-8.0 * h / (2 * below)) for h in range(1, 2 * below + 1, 2)]
    return [*slopes, *between[: heads - below]]


def spread_uniform(key: Key[Array, ""], shape: tuple[int, ...], low: float, high: float) -> Float[Array, "..."]:
    """Returns numbers uniform on (low, high) each, of which every one of n lies in another n-th of it.

    Drawn independently, the decays of two heads may be alike, and fast: a model that cannot recall.
    """
    order, jitter = jax.random.split(key)
    n = math.prod(shape)
    places = jax.random.permutation(order, n) + jax.random.uniform(jitter, (n,))
    return low + (high - low) * (places / n).reshape(shape)


def inverse_softplus(y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x with softplus(x) = y, y > 0."""
    return y + jnp.log(-jnp.expm1(-y))


class StepDecay(nnx.Module):
    """log a_t = -exp(log_rate_h) dt_t,    dt_t = softplus(W x_t + step_bias)    (Mamba; Gu & Dao 2023, Dao & Gu 2024)

    At the start rates are uniform on `rates`, and softplus(step_bias) is log-uniform on (0.001, 0.1), at least 1e-4.
    Neither decays. With `channels` steps are per head and channel, by a map of the caller's (Kimi Linear, 2025).
    """

    def __init__(self, heads: int, rngs: nnx.Rngs, projection: nnx.Module, *, rates=(1.0, 16.0), channels: int = 0):
        self.projection = projection
        shape = (heads, channels) if channels else (heads,)
        step = jnp.exp(spread_uniform(rngs.params(), shape, math.log(1e-3), math.log(0.1)))
        rate = spread_uniform(rngs.params(), (heads,), *rates)
        self.step_bias = parameter(inverse_softplus(step), "h k" if channels else "h", decay=False)
        self.log_rate = parameter(jnp.log(rate), "h", decay=False)

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t h *k"], Float[Array, "b t h *k"]]:
        """Returns log a and dt, fp32."""
        rate, logits = self.terms(x)
        step = jax.nn.softplus(logits)
        return -rate * step, step

    def terms(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "*rate"], Float[Array, "b t h *k"]]:
        """Returns the rates, in a shape that broadcasts, and W x + step_bias, fp32."""
        bias, logits = self.step_bias[...], in_fp32(self.projection(x))
        rate = jnp.exp(self.log_rate[...].astype(logits.dtype))
        return rate if bias.ndim == 1 else rate[:, None], logits.reshape(*x.shape[:2], *bias.shape) + bias


class BoundedDecay(StepDecay):
    """log a_t = -bound sigmoid(exp(log_rate_h) (W x_t + step_bias)), with rates that start at 1: no decay is stronger
    than exp(-bound) (Kimi Linear's safe gate; flash-linear-attention, kda.py)."""

    def __init__(self, heads: int, rngs: nnx.Rngs, projection: nnx.Module, *, bound: float, channels: int):
        super().__init__(heads, rngs, projection, channels=channels)
        self.log_rate = parameter(jnp.zeros(heads), "h", decay=False)
        self.bound = bound

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t h *k"], Float[Array, "b t h *k"]]:
        """Returns log a, and its share of the bound; fp32."""
        rate, logits = self.terms(x)
        share = jax.nn.sigmoid(rate * logits)
        return -self.bound * share, share


class LogSigmoidDecay(nnx.Module):
    """log a_t = logsigmoid(W x_t + bias) / temperature, per head or per channel, by a map of the caller's (GLA, Yang et
    al. 2023, section 4.4)."""

    def __init__(self, projection: nnx.Module, heads: int, temperature: float = 1.0):
        self.projection = projection
        self.heads = heads
        self.temperature = temperature

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h k"]:
        """Returns log a, fp32."""
        logits = in_fp32(self.projection(x)).reshape(*x.shape[:2], self.heads, -1)
        return jax.nn.log_sigmoid(logits) / self.temperature


class LowerBound(nnx.Module):
    """log f = log(lower + (1 - lower) sigmoid(logits)), with a learned lower bound that starts at l / L in layer l of L
    (HGRN; Qin et al. 2023, section 3.3). The first layer's starts, and stays, at `SMALLEST`: no bound."""

    SMALLEST = 1e-6

    def __init__(self, shape: tuple[int, ...], dims: str, place: Place):
        share = jnp.clip(jnp.asarray(place.index) / place.depth, self.SMALLEST, 1 - self.SMALLEST)
        self.logit = parameter(jnp.broadcast_to(jnp.log(share) - jnp.log1p(-share), shape), dims, decay=False)

    def __call__(self, logits: Float[Array, "b t *f"]) -> Float[Array, "b t *f"]:
        lower = self.logit[...].astype(logits.dtype)
        free = jax.nn.log_sigmoid(-lower) + jax.nn.log_sigmoid(logits)
        return jnp.logaddexp(jax.nn.log_sigmoid(lower), free)
