"""Diagonal state space models of one input and one output, whose parameters do not depend on the token.

    x' = A x + B u,   y = 2 Re(C x),   A = diag(-exp(log_rate) + i frequency),   B = 1        x in C^(n/2)

in steps of dt = exp(log_step): exactly for inputs that are constant within a step (zero-order hold),

    log_pole = dt A,   residue = 2 C (exp(dt A) - 1) / A,

or by the bilinear rule: pole = (1 + dt A / 2) / (1 - dt A / 2), residue = 2 C dt / (1 - dt A / 2).

Gu, Gupta, Goel & Re 2022, "On the parameterization and initialization of diagonal state space models", sections 3 and
4: at the start the real part of A is -1/2 and its frequencies are pi k (S4D-Lin) or n / pi (n / (2k + 1) - 1) (S4D-Inv)
for k = 0, 1, ...; dt is log-uniform on (0.001, 0.1), C complex normal with variance 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex

from recollect.layers.modules.decays import spread_uniform
from recollect.layers.modules.linear import parameter

Discretisation = Literal["hold", "bilinear"]
Frequencies = Literal["linear", "inverse"]


class DiagonalStateSpace(nnx.Module):
    """One model per head, of `state` real dimensions: state // 2 modes and their conjugates. Its parameters do not
    decay; all but C form the learning-rate group "filter"."""

    def __init__(
        self,
        heads: int,
        state: int,
        rngs: nnx.Rngs,
        *,
        rule: Discretisation = "hold",
        frequencies: Frequencies = "linear",
    ):
        n = state // 2
        mode = jnp.arange(n)
        first = jnp.pi * mode if frequencies == "linear" else state / jnp.pi * (state / (2 * mode + 1) - 1)
        self.rule = rule
        tags: dict[str, Any] = {"decay": False, "group": "filter"}
        self.log_step = parameter(spread_uniform(rngs.params(), (heads,), math.log(1e-3), math.log(0.1)), "h", **tags)
        self.log_rate = parameter(jnp.full((heads, n), math.log(0.5)), "h k", **tags)
        self.frequency = parameter(jnp.broadcast_to(first, (heads, n)), "h k", **tags)
        part = 0.5**0.5
        self.output_real = parameter(part * jax.random.normal(rngs.params(), (heads, n)), "h k", decay=False)
        self.output_imag = parameter(part * jax.random.normal(rngs.params(), (heads, n)), "h k", decay=False)

    def __call__(self, dtype: Any = jnp.float32) -> tuple[Complex[Array, "h n"], Complex[Array, "h n"]]:
        """Returns the logarithms of poles, and residues, for inputs of `dtype`; computed in fp32 at least."""
        dtype = jnp.promote_types(dtype, jnp.float32)
        step, rate, frequency, real, imag = (
            leaf[...].astype(dtype)
            for leaf in (self.log_step, self.log_rate, self.frequency, self.output_real, self.output_imag)
        )
        a, c = jax.lax.complex(-jnp.exp(rate), frequency), jax.lax.complex(real, imag)
        step = jnp.exp(step)[:, None]
        if self.rule == "bilinear":
            half = step * a / 2
            return jnp.log((1 + half) / (1 - half)), 2 * c * step / (1 - half)
        return step * a, 2 * c * jnp.expm1(step * a) / a
