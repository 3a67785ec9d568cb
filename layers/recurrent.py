"""What mixers on a recurrence share: a mixer says once what it computes, and streams, packs and decodes by it.

    class SomeMixer(RecurrentMixer):
        def mix(self, x, stream):                                       # x (b, t, d), padding zeroed
            q, k, v = self.heads(x, stream)                             # projected, convolved, split into heads
            return self.output(merge_heads(stream.recurrence(q, k, v, log_decay=...)))

Whatever crosses from one call to the next goes through the `Stream`: recurrences, short convolutions, the token before.
Each has a name, under which its state is kept; what the states of a mixer are follows from what it calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Inexact, Int

from recollect.configuration import UserError, at_least
from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Context, Cursor, Mixer, MixerConfig, MixerOutput, Place, check_input, zero_padding
from recollect.layers.modules.linear import Initializer, Linear, matrix_init, output_init, split_heads
from recollect.layers.modules.short_convolution import CausalConvolution
from recollect.layers.packing import document_positions, token_positions
from recollect.layers.state.capacity import check_positions
from recollect.pallas_kernels.gated_convolution import short_convolution
from recollect.pallas_kernels.linear_recurrence import linear_recurrence
from recollect.pallas_kernels.linear_scan import linear_scan
from recollect.pallas_kernels.modal_recurrence import modal_recurrence, state_shape


class HeadSizes(NamedTuple):
    """Key heads g, heads h, which g divides, and the dimensions of one: key k, value v."""

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int


@chz.chz(typecheck=True)
class RecurrentConfig(DirectedConfig):
    """Base of the configs of mixers with heads.

    Attributes:
      heads: heads of values, each with a state of its own.
      key_dim, value_dim: dimensions per head; None: width // heads.
    """

    heads: int = chz.field(default=2, validator=at_least(1))
    key_dim: int | None = chz.field(default=None, validator=at_least(1))
    value_dim: int | None = chz.field(default=None, validator=at_least(1))

    def sizes(self, width: int) -> HeadSizes:
        """Returns the sizes of heads in a model of this width; raises UserError where they do not fit it."""
        key_dim, value_dim = self.key_dim or self.share(width), self.value_dim or self.share(width)
        key_heads = getattr(self, "key_heads", None) or self.heads
        if self.heads % key_heads:
            raise UserError(f"key_heads={key_heads}: must divide heads={self.heads}")
        return HeadSizes(key_heads, self.heads, key_dim, value_dim)

    def share(self, width: int) -> int:
        """Returns the dimensions per head of vectors of this width."""
        if width % self.heads:
            raise UserError(f"heads={self.heads} does not divide the model width {width}")
        return width // self.heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """States by name: of recurrences fp32, of convolutions (b, w, f) the last inputs of the document."""

    parts: dict[str, Any]
    cursor: Cursor


class Stream:
    """The tokens of one call, and what was there before them.

    Attributes:
      context: of the tokens; with every field where a state comes before them.
      state: before them; None for whole sequences. A part that it lacks is zeros.
      after: the parts after them, as operations run.
    """

    def __init__(self, context: Context, state: RecurrentState | None = None):
        self.context = context
        self.state = state
        self.after: dict[str, Any] = {}

    def run(self, name: str, zeros: jax.ShapeDtypeStruct, operation: Callable[..., Any], *args: Any, **kwargs: Any):
        """Returns what `operation` makes of the tokens, from the state called `name` on; `zeros` has the state's shape.

        The operation takes `segment_ids`, `initial_state`, `initial_segment` and `return_state`, and returns a pair.
        """
        kwargs = {"segment_ids": self.context.segments, **kwargs}
        if self.state is None:
            return operation(*args, **kwargs)[0]
        if name in self.after:
            raise ValueError(f"two states of one mixer are called {name!r}")
        before = self.state.parts.get(name)
        before = jnp.zeros(zeros.shape, zeros.dtype) if before is None else before
        past = {"initial_state": before, "initial_segment": self.state.cursor.segment, "return_state": True}
        out, self.after[name] = operation(*args, **kwargs, **past)
        return out

    def index(self, x: Float[Array, "b t *rest"]) -> Int[Array, "b t"]:
        """Returns the index of each token of x within its document, counted, whatever positions the context has."""
        if self.state is not None:
            assert self.context.segments is not None
            return document_positions(self.context.segments, self.state.cursor)
        return token_positions(dataclasses.replace(self.context, positions=None), *x.shape[:2])

    def recurrence(
        self,
        q: Float[Array, "b t g k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t h v"],
        *,
        name: str = "memory",
        **operands: Any,
    ) -> Float[Array, "b t h v"]:
        """Returns the outputs of `linear_recurrence`."""
        zeros = jax.ShapeDtypeStruct((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float32)
        return self.run(name, zeros, linear_recurrence, q, k, v, **operands)

    def scan(
        self, a: Float[Array, "b t f"], b: Float[Array, "b t f"], *, name: str = "memory"
    ) -> Float[Array, "b t f"]:
        """Returns h_t = a_t h_{t-1} + b_t per channel, fp32 (`linear_scan`)."""
        return self.run(name, jax.ShapeDtypeStruct((b.shape[0], b.shape[2]), jnp.float32), linear_scan, a, b)

    def modes(
        self,
        v: Float[Array, "b t h v"],
        log_poles: Inexact[Array, "h n"],
        residues: Inexact[Array, "h n"],
        *,
        q: Float[Array, "b t h k"] | None = None,
        k: Float[Array, "b t h k"] | None = None,
        name: str = "memory",
    ) -> Float[Array, "b t h v"]:
        """Returns the outputs of `modal_recurrence`."""
        zeros = jax.ShapeDtypeStruct(state_shape(v, log_poles, k), jnp.float32)
        return self.run(name, zeros, modal_recurrence, v, log_poles, residues, q=q, k=k)

    def convolution(
        self, module: CausalConvolution, x: Float[Array, "b t f"], *, name: str, activation: str = "none"
    ) -> Float[Array, "b t f"]:
        """Returns a short convolution of `x`."""
        bias = None if module.bias is None else module.bias[...]
        return self.filtered(name, x, module.taps[...], bias, activation=activation)

    def previous(self, x: Float[Array, "b t *rest"], *, name: str = "previous") -> Float[Array, "b t *rest"]:
        """Returns `x` of the token before each token; zeros at the first of a document."""
        rows = x.reshape(*x.shape[:2], -1)
        taps = jnp.zeros((2, rows.shape[2])).at[1].set(1)
        return self.filtered(name, rows, taps).reshape(x.shape)

    def filtered(
        self, name: str, x: Float[Array, "b t f"], taps: Float[Array, "w f"], *args: Any, **kwargs: Any
    ) -> Float[Array, "b t f"]:
        """Returns the outputs of `short_convolution`."""
        zeros = jax.ShapeDtypeStruct((x.shape[0], taps.shape[0] - 1, x.shape[2]), x.dtype)
        return self.run(name, zeros, short_convolution, x, taps, *args, **kwargs)


class StreamMixer(Mixer):
    """Base of mixers that say what they compute in `mix`, with a `Stream`."""

    def __init__(self, config: MixerConfig, width: int):
        self.config = config
        self.width = width

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        """Returns the mixer's output at the tokens of one call; `x` holds zeros at padding."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        check_input(x, self.width)
        return MixerOutput(self.mix(zero_padding(x, context), Stream(context)))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> RecurrentState:
        """Returns zeros: as many as one token leaves."""
        token = jax.ShapeDtypeStruct((batch_size, 1, self.width), dtype)
        empty = RecurrentState({}, Cursor.start(batch_size))
        shapes = jax.eval_shape(lambda x: self.extend(x, empty)[1].parts, token)
        return RecurrentState(jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes), empty.cursor)

    def extend(
        self, x: Float[Array, "b t d"], state: RecurrentState, context: Context = Context()
    ) -> tuple[MixerOutput, RecurrentState]:
        check_input(x, self.width)
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        check_positions(state.cursor, tokens, self.config.traits.maximum_length)
        stream = Stream(tokens, state)
        hidden = self.mix(zero_padding(x, tokens), stream)
        return MixerOutput(hidden), RecurrentState(stream.after, cursor)


class RecurrentMixer(StreamMixer):
    """Base of the modules on `linear_recurrence`: projections into heads and back. `inits` are
    initialisers of projections by name where they are not the project's.

    Attributes:
      sizes: of heads.
      activates: SiLU on queries, keys and values also where they pass no convolution.
    """

    activates: ClassVar[bool] = False

    def __init__(
        self,
        config: MixerConfig,
        width: int,
        place: Place,
        rngs: nnx.Rngs,
        sizes: HeadSizes,
        *,
        kernel: int | None = None,
        convolution_bias: bool = False,
        inits: Mapping[str, Initializer] = MappingProxyType({}),
    ):
        super().__init__(config, width)
        self.sizes = sizes
        keys, values = sizes.key_heads * sizes.key_dim, sizes.heads * sizes.value_dim
        inits = (
            dict.fromkeys(("query", "key", "value"), matrix_init) | {"output": output_init(place.depth)} | dict(inits)
        )
        self.query = Linear(width, keys, "d gk", rngs, init=inits["query"])
        self.key = Linear(width, keys, "d gk", rngs, init=inits["key"])
        self.value = Linear(width, values, "d hv", rngs, init=inits["value"])
        channels = {} if kernel is None else {"query": keys, "key": keys, "value": values}
        parts: Any = {
            name: CausalConvolution(n, kernel or 1, rngs, bias=convolution_bias) for name, n in channels.items()
        }
        self.convolutions = nnx.Dict(parts)
        self.output = Linear(values, width, "hv d", rngs, init=inits["output"])

    def heads(
        self, x: Float[Array, "b t d"], stream: Stream
    ) -> tuple[Float[Array, "b t g k"], Float[Array, "b t g k"], Float[Array, "b t h v"]]:
        """Returns queries, keys and values: projected, convolved with SiLU where there are convolutions."""
        counts = {"query": self.sizes.key_heads, "key": self.sizes.key_heads, "value": self.sizes.heads}
        q, k, v = (split_heads(self.projected(name, x, stream), n) for name, n in counts.items())
        return q, k, v

    def recurrence(self, x: Float[Array, "b t d"], stream: Stream, **operands: Any) -> Float[Array, "b t h v"]:
        """Returns what the recurrence reads; `operands` are the arguments of `linear_recurrence`."""
        return stream.recurrence(**operands)

    def projected(self, name: str, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t f"]:
        """Returns the projection called `name` of x, convolved where there are convolutions."""
        y = getattr(self, name)(x)
        if name in self.convolutions:
            return stream.convolution(self.convolutions[name], y, name=name, activation="silu")
        return jax.nn.silu(y) if self.activates else y
