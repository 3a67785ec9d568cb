"""Softmax attention of text to itself and to percepts that never enter the stream (SAISA).

    m = norm(W_2 gelu(W_1 e))        per layer, from the continuous inputs e of the percepts
    o_i = sum over text j <= i and percepts before i of softmax(q_i . k_j / sqrt(k)) v_j,    k, v of x_j or of m_j

Percepts are no queries: their outputs are zeros. Text reads what its layer's own map makes of their inputs, with the
layer's keys and values, instead of percepts that other layers have changed; so there is no attention among percepts,
and they need no MLP.

Yuan et al., SAISA (arXiv 2502.02458); icip-cas/SAISA. There the layer's input norm also normalises m; here m has a norm
of its own.

Easy to get wrong: percepts keep their places in the sequence, and so do the positions of the text behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least
from recollect.layers.mixer import Context, MixerOutput, Place, zero_padding
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.linear import Linear
from recollect.layers.modules.norms import RMSNormalization
from recollect.pallas_kernels.masks import PERCEPT, Causal, Mask, QueryIs, SameSegment


@chz.chz(typecheck=True)
class InjectedAttention(SoftmaxConfig):
    """Attention to text and to injected percepts.

    Attributes:
      inputs: width e of the percepts' continuous inputs.
    """

    inputs: int = chz.field(default=32, validator=at_least(1))

    NOT_SERVED: ClassVar[Mapping[str, str]] = {
        "causal": "text sees what is before it, and percepts see nothing",
        "cross": "what it reads beside the text is injected into its own sequence",
        "design": "percepts see nothing here",
    }

    def mask(self) -> Mask:
        return SameSegment() & Causal() & ~QueryIs("token_types", (PERCEPT,))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> InjectedAttentionMixer:
        return InjectedAttentionMixer(self, width, place, rngs)


class InjectedAttentionMixer(SoftmaxAttention):
    """The module of `InjectedAttention`."""

    config: InjectedAttention

    def __init__(self, config: InjectedAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.inner, self.outer = Linear(config.inputs, width, "e f", rngs), Linear(width, width, "f d", rngs)
        self.norm = RMSNormalization(width)

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        return super().__call__(self._injected(x, context), context)

    def extend(self, x: Float[Array, "b t d"], state: Any, context: Context = Context()) -> tuple[MixerOutput, Any]:
        return super().extend(self._injected(x, context), state, context)

    def _injected(self, x: Float[Array, "b t d"], context: Context) -> Float[Array, "b t d"]:
        """Returns x with what the layer makes of percepts in their places; x where no token has continuous inputs."""
        vectors, types = context.vectors, context.token_types
        if vectors is None or types is None:
            return x
        if vectors.shape[2] != self.config.inputs:
            have = f"the percepts' continuous inputs have the width {vectors.shape[2]}"
            raise UserError(f"inputs={self.config.inputs}: {have}")
        is_percept = (types == PERCEPT)[..., None]
        vectors = jnp.where(is_percept, zero_padding(vectors, context), 0).astype(x.dtype)
        memory = self.norm(self.outer(jax.nn.gelu(self.inner(vectors), approximate=False)))
        return jnp.where(is_percept, memory, x)
