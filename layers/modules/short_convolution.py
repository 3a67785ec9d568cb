"""Short causal depthwise convolution, the part that mixers call; as a mixer: layers/mixers/short_convolution.py.

    y_i = bias + sum_{j < kernel} taps[j] x_{i-j}        per channel, within the document

Initialised as torch's Conv1d, uniform on (-1/sqrt(kernel), 1/sqrt(kernel)); taps are stored current token first,
torch's last.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import requires
from recollect.layers.mixer import Context, Cursor
from recollect.layers.modules.linear import parameter
from recollect.pallas_kernels.gated_convolution import short_convolution

has_taps = requires(lambda kernel: kernel >= 1, "a convolution needs at least 1 tap, the current token's")
"""Validator of kernel sizes."""


class CausalConvolution(nnx.Module):
    """A short convolution without a cursor. Padding in x may hold anything; it reads 0.

    recollect.pallas_kernels.gated_convolution computes gate and activation together with the convolution.
    """

    def __init__(self, channels: int, kernel: int, rngs: nnx.Rngs, *, bias: bool = False):
        bound = kernel**-0.5
        self.kernel_size = kernel
        self.channels = channels

        def uniform(*shape: int) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)

        self.taps = parameter(uniform(kernel, channels), "w f")
        self.bias = parameter(uniform(channels), "f") if bias else None

    def __call__(
        self, x: Float[Array, "b t f"], context: Context, *, part: tuple[int, int] = (0, 1), **options: Any
    ) -> Float[Array, "b t f"]:
        """Returns the convolution of whole sequences, or of part i of n equal parts of the channels (`part=(i, n)`).

        Splitting channels after the convolution costs several times more on CPU, where XLA fuses the gradient across
        the parts. `options` are the operation's `out_gate` and `activation`.
        """
        index, count = part
        taps = jnp.split(self.taps[...], count, axis=-1)[index]
        bias = None if self.bias is None else jnp.split(self.bias[...], count)[index]
        return short_convolution(x, taps, bias, segment_ids=context.segments, **options)[0]

    def init_state(self, batch_size: int, dtype: Any = jnp.float32) -> Float[Array, "b w f"]:
        """Returns the state before any token: the last kernel - 1 inputs of the document, oldest first."""
        return jnp.zeros((batch_size, self.kernel_size - 1, self.channels), dtype)

    def extend(
        self, x: Float[Array, "b t f"], state: Float[Array, "b w f"], tokens: Context, before: Cursor, **options: Any
    ) -> tuple[Float[Array, "b t f"], Float[Array, "b w f"]]:
        """Returns the convolution at the next tokens x, and the state after them; `tokens` are from `before.read`."""
        stream: dict[str, Any] = {"initial_state": state, "initial_segment": before.segment, "return_state": True}
        bias = None if self.bias is None else self.bias[...]
        y, after = short_convolution(x, self.taps[...], bias, segment_ids=tokens.segments, **stream, **options)
        assert after is not None
        return y, after
