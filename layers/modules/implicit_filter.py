"""Long filters written as functions of time, so that their parameter count does not grow with their length.

Time of tap i is i / maximum, or i / (maximum - 1) as in Zoology's code ("last": the last tap's time is 1), with the
*configured* maximum length: dividing by the input's length instead would give a prompt another filter than its
continuation. Phases are i / maximum in both.

    e(i) = [time, cos(2 pi f phase), -sin(2 pi f phase)],    f = 1e-4, the one band of an embedding of 3 dimensions

BaseConv's (Zoology, Arora et al. 2024):    filter = W2 relu(W1 e + b1) + b2, 16 hidden units.
Hyena's (Poli et al. 2023, section 3):
    filter = W4 sin(w (W3 sin(w (W2 sin(w (W1 e + b1)) + b2)) + b3)) * exp(-time |delta|)
with one learned frequency w per hidden unit, shared by the layers, and decays delta per channel, spread linearly from
log(0.01)/1.5 to log(0.01)/0.3, so that channels fall to 1 % after 1.5 down to 0.3 of the maximum. Their embedding is
constant, or, for Hyena, a parameter of its own ("filter_times", published at a learning rate of 1e-5; Zoology's trainer
gives it the run's).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.modules.linear import Linear, matrix_init, parameter

TimeUnit = Literal["length", "last"]

EMBEDDING = 3
BAND = 1e-4
SLOWEST, FASTEST = math.log(0.01) / 1.5, math.log(0.01) / 0.3


def times(length: int, maximum: int, unit: TimeUnit = "length") -> Float[Array, " t"]:
    """Returns the times of the first taps."""
    return jnp.arange(length, dtype=jnp.float32) / (maximum if unit == "length" else max(1, maximum - 1))


def embed_times(length: int, maximum: int, unit: TimeUnit = "length") -> Float[Array, "t 3"]:
    """Returns the features of the first taps' times that the filters' networks take."""
    time, angle = times(length, maximum, unit), 2 * math.pi * BAND * times(length, maximum)
    return jnp.stack([time, jnp.cos(angle), -jnp.sin(angle)], axis=-1)


class ReluFilter(nnx.Module):
    """BaseConv's implicit filter."""

    def __init__(self, channels: int, maximum: int, rngs: nnx.Rngs, *, hidden: int = 16, unit: TimeUnit = "length"):
        self.maximum = maximum
        self.unit: TimeUnit = unit
        self.up = Linear(EMBEDDING, hidden, "e u", rngs, bias=True)
        self.down = Linear(hidden, channels, "u f", rngs, bias=True)

    def __call__(self, length: int) -> Float[Array, "t f"]:
        """Returns the first `length` taps, fp32."""
        return self.down(jax.nn.relu(self.up(embed_times(length, self.maximum, self.unit))))


class SineFilter(nnx.Module):
    """Hyena's implicit filter. Its parameters form the learning-rate group "filter" and do not decay.

    `trains_times`: the embedding of times is a parameter, in the group "filter_times".
    """

    def __init__(
        self,
        channels: int,
        maximum: int,
        order: int,
        rngs: nnx.Rngs,
        *,
        unit: TimeUnit = "length",
        trains_times: bool = False,
    ):
        self.channels = channels
        self.maximum = maximum
        self.unit: TimeUnit = unit
        embedded = embed_times(maximum, maximum, unit) if trains_times else None
        self.embedding = None if embedded is None else parameter(embedded, "t e", decay=False, group="filter_times")
        tags: dict[str, Any] = {"decay": False, "group": "filter"}
        self.frequency = parameter(jnp.ones(order), "u", **tags)
        sizes = ((EMBEDDING, "e u"), (order, "u u"), (order, "u u"))
        self.layers = nnx.List([Linear(size, order, dims, rngs, bias=True, **tags) for size, dims in sizes])
        self.output = parameter(matrix_init(rngs.params(), (order, channels)), "u f", **tags)

    def __call__(self, length: int) -> Float[Array, "t f"]:
        """Returns the first `length` taps, fp32."""
        time = times(length, self.maximum, self.unit)
        z = embed_times(length, self.maximum, self.unit) if self.embedding is None else self.embedding[...][:length]
        for layer in self.layers:
            z = jnp.sin(self.frequency[...] * layer(z))
        decay = jnp.abs(jnp.linspace(SLOWEST, FASTEST, self.channels))
        return (z @ self.output[...]) * jnp.exp(-time[:, None] * decay)
