"""Base of softmax mixers some of whose linear maps are convolved over time (layers/convolved.py)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from recollect.layers.convolved import ConvolvedLinear, streaming
from recollect.layers.mixer import Context, MixerOutput
from recollect.layers.mixers.attention import SoftmaxAttention
from recollect.layers.recurrent import RecurrentState, Stream


class ConvolvedAttention(SoftmaxAttention):
    """Softmax attention whose state is its cache, and the last inputs of each `ConvolvedLinear` that it has."""

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        with streaming(Stream(context)):
            return super().__call__(x, context)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> Any:
        """Returns a cache of one slot per token, and the last inputs of the convolutions."""
        maps = [part for part in vars(self).values() if isinstance(part, ConvolvedLinear)]
        shapes = {part.name: (part.convolution.kernel_size - 1, part.kernel.shape[-1]) for part in maps}
        parts = {name: jnp.zeros((batch_size, *shape), dtype) for name, shape in shapes.items()}
        return super().init_state(batch_size, max_length, dtype), parts

    def extend(self, x: Float[Array, "b t d"], state: Any, context: Context = Context()) -> tuple[MixerOutput, Any]:
        cache, parts = state
        stream = Stream(cache.cursor.read(context, *x.shape[:2])[0], RecurrentState(parts, cache.cursor))
        with streaming(stream):
            out, cache = self.extend_cache(x, cache, context)
        return out, (cache, stream.after)

    def extend_cache(self, x: Float[Array, "b t d"], cache: Any, context: Context) -> tuple[MixerOutput, Any]:
        """Returns the outputs for the next tokens, and the cache after them."""
        return super().extend(x, cache, context)
