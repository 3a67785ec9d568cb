"""The contract of everything that mixes along the sequence.

    mixer = config.build(width, place, rngs)            # place: layer index and depth
    out = mixer(x, context)                             # x (b, t, d) -> out.hidden (b, t, d), out.losses, out.metrics
    state = mixer.init_state(batch_size, max_length)    # a pytree of arrays; its bytes are the state size
    out, state = mixer.extend(x, state, context)        # any number of new tokens: prefill and decode in one method

What a mixer may know about tokens beside their vectors is in the `Context` (context.py). A field that is None stands
for the plain case (positions that count up, one document, no padding, ordinary tokens only), known when the program is
traced, so that the plain case pays for nothing. A mixer that reads another sequence (`traits.cross`) starts its streams
with `init_cross_state(source)` in place of `init_state`.

Dimension letters, everywhere: b batch, t query time, s key time, h heads, g key heads, k key dim, v value dim, d model
width, c chunk, w window, n blocks. Parameters have a few more: layers/modules/linear.py.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from recollect.configuration import Config, UserError
from recollect.layers.context import Context, Source
from recollect.layers.packing import continued
from recollect.layers.traits import Traits
from recollect.pallas_kernels import segments as packed_rows
from recollect.pallas_kernels.dispatch import is_split

State = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixerOutput:
    """What a mixer adds to the residual stream; auxiliary losses and metrics by name, fp32 scalars (losses already
    carry their coefficient). They are means over the tokens that are not padding; or else formed of `sums`, which add
    up over the pieces of a batch (layers/token_sums.py)."""

    hidden: Float[Array, "b t d"]
    losses: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
    sums: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where each row of a stream stands: the next position and the last segment."""

    position: Int[Array, " b"]
    segment: Int[Array, " b"]

    @classmethod
    def start(cls, batch_size: int) -> Cursor:
        """Returns the cursor before any token."""
        # Segment 0 is padding, which no token can continue: the first token starts a document whatever its segment is.
        return cls(jnp.zeros(batch_size, jnp.int32), jnp.zeros(batch_size, jnp.int32))

    def read(self, context: Context, batch_size: int, length: int) -> tuple[Context, Cursor]:
        """Returns the context with every field filled in, continuing this stream, and the cursor after the tokens.

        Without segments the tokens continue the row's document (segment 1 when there was none so far).
        """
        return continued(context, self, batch_size, length)


def zero_padding(x: Shaped[Array, "b t *rest"], context: Context) -> Shaped[Array, "b t *rest"]:
    """Returns `x` with padded positions zeroed. By `where`, so that NaN in padding stops here, in gradients too."""
    return x if context.segments is None else packed_rows.zero_padding(x, context.segments)


def constrain_activations(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Returns `x` constrained to be split over the ambient mesh by rows and by tokens (its axis sequence); itself
    without a mesh."""
    if not is_split():
        return x
    from recollect.pallas_kernels.sharding import constrained

    return constrained(x, "b t d")


def check_input(x: jax.Array, width: int) -> None:
    """Raises ValueError unless `x` is (b, t, width)."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"x has the shape {x.shape}: it must be (batch, tokens, {width}), the width of this mixer")


def check_length(length: int, maximum: int | None, what: str) -> None:
    """Raises UserError when an input is longer than a configured maximum; None allows any length."""
    if maximum is not None and length > maximum:
        raise UserError(f"an input of {length} tokens is longer than {what} of {maximum}")


@dataclasses.dataclass(frozen=True)
class Place:
    """Position of a layer in the stack. `index` may be a traced scalar (layers of a stage are built under vmap): use
    it in array arithmetic only. `depth` is the number of layers."""

    index: int | Int[Array, ""] = 0
    depth: int = 1


@chz.chz(typecheck=True)
class MixerConfig(Config):
    """Base of all mixers' configs."""

    # Why it has no field `causal` or `cross`, or takes one value of it alone: layers/patterns.py.
    NOT_SERVED: ClassVar[Mapping[str, str]] = {}

    @chz.validate
    def _serves(self) -> None:
        for name, plain in (("causal", True), ("cross", False), ("design", None)):
            value = getattr(self, name, plain)
            if value != plain and name in self.NOT_SERVED:
                raise UserError(f"{type(self).__name__} takes no {name}={value}: {self.NOT_SERVED[name]}")

    @abc.abstractmethod
    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> Mixer:
        """Returns the module for a model of this width; raises UserError where the config does not fit it."""

    @property
    def traits(self) -> Traits:
        """Traits of the module that `build` returns."""
        return Traits()


class Mixer(nnx.Module):
    """Base of all mixers."""

    config: Any

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        """Mixes whole sequences."""
        raise NotImplementedError

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> State:
        """Returns the state before any token, for streams of at most `max_length` tokens beside padding; activations
        are stored in `dtype`."""
        raise UserError(f"{type(self).__name__} has no init_state, so it cannot stream or generate")

    def init_cross_state(self, source: Source, dtype: Any = jnp.float32) -> State:
        """Returns the state before any token of a cross mixer: what it keeps of its source, stored in `dtype`."""
        raise UserError(f"{type(self).__name__} has no init_cross_state, so it cannot stream beside a source")

    def extend(self, x: Float[Array, "b t d"], state: State, context: Context = Context()) -> tuple[MixerOutput, State]:
        """Mixes the next tokens of each row. Padded tokens (segment 0) never advance the state.

        Where the state keeps every token, more than fit raise UserError; inside jit they are dropped, and the next call
        outside of it raises (layers/state/capacity.py). States of a fixed size take streams of any length.
        """
        raise NotImplementedError
