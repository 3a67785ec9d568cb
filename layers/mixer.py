"""The contract of everything that mixes along the sequence.

    mixer = config.build(width, place, rngs)            # place: layer index and depth
    out = mixer(x, context)                             # x (b, t, d) -> out.hidden (b, t, d), out.losses, out.metrics
    state = mixer.init_state(batch_size, max_length)    # a pytree of arrays; its bytes are the state size
    out, state = mixer.extend(x, state, context)        # any number of new tokens: prefill and decode in one method

What a mixer may know about tokens beside their vectors is in the `Context`. A field that is None stands for the plain
case (positions that count up, one document, no padding, ordinary tokens only), known when the program is traced, so
that the plain case pays for nothing.

Dimension letters, used everywhere: b batch, t query time, s key time, h heads, k key dim, v value dim, d model width, c
chunk, w window, n blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Shaped

from recollect.configuration import Config, UserError
from recollect.pallas_kernels.sharding import constrained

State = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Facts about the tokens of one call, each (b, t) int32 or None.

    Attributes:
      positions: index of the token within its document, landmarks counted. None: counted up from the state (or from 0).
      segments: document of the token; 0 is padding. Tokens of a document are contiguous, and no document returns after
        it ended. None: one document, no padding.
      token_types: ORDINARY or LANDMARK. None: all ordinary.
    """

    positions: jax.Array | None = None
    segments: jax.Array | None = None
    token_types: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixerOutput:
    """hidden (b, t, d); auxiliary losses and metrics by name, scalars in fp32 (losses already carry their
    coefficient)."""

    hidden: jax.Array
    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where each row of a stream stands: the next position and the last segment, both (b,) int32."""

    position: jax.Array
    segment: jax.Array

    @classmethod
    def start(cls, batch_size: int) -> Cursor:
        # Segment 0 is padding, which no token can continue: the first token starts a document whatever its segment is.
        return cls(jnp.zeros(batch_size, jnp.int32), jnp.zeros(batch_size, jnp.int32))

    def read(self, context: Context, batch_size: int, length: int) -> tuple[Context, Cursor]:
        """Fills in the fields that `context` leaves out, continuing this stream; returns them and the cursor after the
        tokens.

        Without segments the tokens continue the row's document (segment 1 when none was given so far).
        """
        segments = context.segments
        if segments is None:
            current = jnp.where(self.segment == 0, 1, self.segment)
            segments = jnp.broadcast_to(current[:, None], (batch_size, length))
            counted = self.position[:, None] + jnp.arange(length, dtype=jnp.int32)
            last_segment = current
        else:
            counted = document_positions(segments, self)
            last_segment = last_valid(segments, segments, self.segment)
        positions = counted if context.positions is None else context.positions
        types = jnp.zeros_like(segments) if context.token_types is None else context.token_types
        after = Cursor(last_valid(positions + 1, segments, self.position), last_segment)
        return Context(positions, segments, types), after


def document_positions(segments: jax.Array, cursor: Cursor | None = None) -> jax.Array:
    """Index of each token within its document, (b, t) int32; padding gets the index of the next token of its row.

    Counts valid tokens, so that padding between or before documents shifts nothing. With a cursor, tokens of the
    cursor's segment continue at its position.
    """
    valid = segments != 0
    count = jnp.cumsum(valid, axis=1) - valid  # valid tokens before each one
    before = previous_segment(segments, cursor)
    starts = valid & (segments != before)
    start_count = jax.lax.cummax(jnp.where(starts, count, -1), axis=1)
    offset = 0 if cursor is None else cursor.position[:, None]
    return jnp.where(start_count >= 0, count - start_count, count + offset).astype(jnp.int32)


def token_positions(context: Context, batch_size: int, length: int) -> jax.Array:
    """The context's positions (b, t), counted within documents where it has none."""
    if context.positions is not None:
        return context.positions
    if context.segments is not None:
        return document_positions(context.segments)
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch_size, length))


def previous_segment(segments: jax.Array, cursor: Cursor | None = None) -> jax.Array:
    """Segment of the valid token before each token, (b, t); before the first it is the cursor's, else 0."""
    first = jnp.zeros_like(segments[:, :1]) if cursor is None else cursor.segment[:, None]
    return jnp.concatenate([first, carry_segments(segments, cursor)[:, :-1]], axis=1)


def carry_segments(segments: jax.Array, cursor: Cursor | None = None) -> jax.Array:
    """Segments in which padding takes the segment of the valid token before it, (b, t)."""
    b, t = segments.shape
    index = jax.lax.cummax(jnp.where(segments != 0, jnp.arange(t), -1), axis=1)
    first = jnp.zeros((b, 1), segments.dtype) if cursor is None else cursor.segment[:, None]
    return jnp.where(index >= 0, jnp.take_along_axis(segments, jnp.maximum(index, 0), axis=1), first)


def last_valid(values: jax.Array, segments: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Value (b, t, ...) at the last valid token of each row, `otherwise` (b, ...) for rows of padding only."""
    valid = segments != 0
    index = jnp.max(jnp.where(valid, jnp.arange(segments.shape[1]), -1), axis=1)
    extra = (1,) * (values.ndim - 2)
    taken = jnp.take_along_axis(values, jnp.maximum(index, 0).reshape(-1, 1, *extra), axis=1)[:, 0]
    return jnp.where((index >= 0).reshape(-1, *extra), taken, otherwise)


def zero_padding(x: Shaped[Array, "b t *rest"], context: Context) -> Shaped[Array, "b t *rest"]:
    """`x` (b, t, ...) with padded positions zeroed. By `where`, so that NaN in padding stops here, in gradients too."""
    if context.segments is None:
        return x
    return jnp.where((context.segments != 0).reshape(*context.segments.shape, *(1,) * (x.ndim - 2)), x, 0)


def lay_out(x: jax.Array) -> jax.Array:
    """`x` (b, t, d) between layers, said to be split over the ambient mesh by rows and by tokens (the axis
    sequence); itself without a mesh."""
    return constrained(x, "b t d")


@dataclasses.dataclass(frozen=True)
class Traits:
    """What laws a mixer can be held to.

    Attributes:
      causal: no output depends on a later input.
      streams: has `init_state` and `extend`.
      exact_causality: causal bit for bit; False where a Fourier transform spreads rounding, or where what later tokens
        choose may group a query with others and so round its sums otherwise (then 1e-5).
      maximum_length: longest input the configuration allows; None for any.
      landmark_block: ordinary tokens before each landmark the model must insert for this mixer; None for a mixer that
        needs none.
    """

    causal: bool = True
    streams: bool = True
    exact_causality: bool = True
    maximum_length: int | None = None
    landmark_block: int | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the stack a layer stands. `index` may be a traced scalar (layers of a stage are built under vmap): use
    it in array arithmetic only. `depth` is the number of layers."""

    index: int | jax.Array = 0
    depth: int = 1


@chz.chz(typecheck=True)
class MixerConfig(Config):
    """Base of all mixers' configs."""

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> Mixer:
        raise UserError(
            f"{type(self).__name__} is no mixer of its own: name one of those that layers/__init__.py exports"
        )

    @property
    def traits(self) -> Traits:
        return Traits()


class Mixer(nnx.Module):
    """Base of all mixers."""

    config: Any

    def __call__(self, x: jax.Array, context: Context = Context()) -> MixerOutput:
        """Mixes a whole sequence, x (b, t, d)."""
        raise NotImplementedError

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> State:
        """The state before any token, for streams of at most `max_length` tokens; activations are stored in `dtype`."""
        raise NotImplementedError

    def extend(self, x: jax.Array, state: State, context: Context = Context()) -> tuple[MixerOutput, State]:
        """Mixes the next tokens of each row, x (b, t, d). Padded tokens (segment 0) never advance the state."""
        raise NotImplementedError
