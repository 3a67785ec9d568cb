"""Long filters written as functions of time, so that their parameter count does not grow with their length.

Time of tap i is i / maximum, with the *configured* maximum length: dividing by the input's length instead would give a
prompt another filter than its continuation. (Zoology's positions are linspace(0, 1, maximum), i / (maximum - 1).)

    e(time) = [time, cos(2 pi f time), -sin(2 pi f time)],    f = 1e-4, the one band of an embedding of 3 dimensions

BaseConv's (Zoology, Arora et al. 2024):    filter = W2 relu(W1 e + b1) + b2, 16 hidden units.
Hyena's (Poli et al. 2023, section 3):
    filter = W4 sin(w (W3 sin(w (W2 sin(w (W1 e + b1)) + b2)) + b3)) * exp(-time |delta|)
with one learned frequency w per hidden unit, shared by the layers, and decays delta per channel, spread linearly from
log(0.01)/1.5 to log(0.01)/0.3, so that channels fall to 1 % after 1.5 down to 0.3 of the maximum. Their embedding is
constant here; Hyena also offers training it at a learning rate of 1e-5.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.modules.linear import Linear, normal, parameter

EMBEDDING = 3
BAND = 1e-4
SLOWEST, FASTEST = math.log(0.01) / 1.5, math.log(0.01) / 0.3


def times(length: int, maximum: int) -> Float[Array, " t"]:
    """Returns the times of the first taps."""
    return jnp.arange(length, dtype=jnp.float32) / maximum


def embed_times(time: Float[Array, " t"]) -> Float[Array, "t 3"]:
    """Returns the features of time that the filters' networks take."""
    angle = 2 * math.pi * BAND * time
    return jnp.stack([time, jnp.cos(angle), -jnp.sin(angle)], axis=-1)


class ReluFilter(nnx.Module):
    """BaseConv's implicit filter."""

    def __init__(self, channels: int, maximum: int, rngs: nnx.Rngs, *, hidden: int = 16):
        self.maximum = maximum
        self.up = Linear(EMBEDDING, hidden, "e u", rngs, bias=True)
        self.down = Linear(hidden, channels, "u f", rngs, bias=True)

    def __call__(self, length: int) -> Float[Array, "t f"]:
        """Returns the first `length` taps, fp32."""
        return self.down(jax.nn.relu(self.up(embed_times(times(length, self.maximum)))))


class SineFilter(nnx.Module):
    """Hyena's implicit filter. Its parameters form the learning-rate group "filter" and do not decay."""

    def __init__(self, channels: int, maximum: int, order: int, rngs: nnx.Rngs):
        self.channels = channels
        self.maximum = maximum
        tags: dict[str, Any] = {"decay": False, "group": "filter"}
        self.frequency = parameter(jnp.ones(order), "u", **tags)
        sizes = ((EMBEDDING, "e u"), (order, "u u"), (order, "u u"))
        self.layers = nnx.List([Linear(size, order, dims, rngs, bias=True, **tags) for size, dims in sizes])
        self.output = parameter(normal()(rngs.params(), (order, channels), jnp.float32), "u f", **tags)

    def __call__(self, length: int) -> Float[Array, "t f"]:
        """Returns the first `length` taps, fp32."""
        time = times(length, self.maximum)
        z = embed_times(time)
        for layer in self.layers:
            z = jnp.sin(self.frequency[...] * layer(z))
        decay = jnp.abs(jnp.linspace(SLOWEST, FASTEST, self.channels))
        return (z @ self.output[...]) * jnp.exp(-time[:, None] * decay)
