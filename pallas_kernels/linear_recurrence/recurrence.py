"""The inputs of a recurrence as one pytree: their checks, and the steps with which every implementation begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recollect.pallas_kernels.segments import carry_segments, zero_padding

Decay = Literal["none", "head", "key", "value"]
Leaf = Any
"""An array or None; inside transformations whatever they put in a leaf's place."""

DIMENSIONS: Mapping[str, str | tuple[str, ...]] = {
    "q": "b t h k",
    "k": "b t h k",
    "v": "b t h v",
    "log_decay": ("h", "b t h", "b t h k"),
    "value_log_decay": "b t h v",
    "write_strength": ("b t h", "b t h v"),
    "erase_read": "b t h k",
    "erase_write": "b t h k",
    "initial_state": "b h k v",
    "segment_ids": "b t",
    "initial_segment": "b",
}
"""Field of `Recurrence` -> its dimensions, several where its rank may differ; q and k may have fewer heads."""

PER_TOKEN = tuple(name for name in DIMENSIONS if name.split("_")[-1] not in ("state", "ids", "segment"))
"""Fields with a token axis, of which log_decay (h,) lacks it, without the segments."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The inputs of `linear_recurrence`, whose module has the equation and what published models pass. The backends of
    `taylor_attention` take the same, q and k before the feature map.

    Attributes:
      q, k: (b, t, g, k) queries and keys; g divides h, and head i of v goes with head i // (h / g) of these.
      v: (b, t, h, v).
      log_decay: g, None, (h,), (b, t, h) or (b, t, h, k); at most 0 for a state that stays bounded.
      value_log_decay: c, None or (b, t, h, v), the decay of the state's columns.
      write_strength: w, None (1), (b, t, h) or (b, t, h, v).
      erase_read: e, None or (b, t, h, k).
      erase_write: u, None (k itself) or (b, t, h, k); only with erase_read.
      initial_state: (b, h, k, v) fp32, or (b, n, h, k, v) for the n-th document of each row; None is zero.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      initial_segment: (b,) the segment that initial_state belongs to.
      erase_before_decay: whether the erase reads the state before this token's decay; only with erase_read.
      scale: multiplies the outputs.
    """

    q: Leaf
    k: Leaf
    v: Leaf
    log_decay: Leaf = None
    value_log_decay: Leaf = None
    write_strength: Leaf = None
    erase_read: Leaf = None
    erase_write: Leaf = None
    initial_state: Leaf = None
    segment_ids: Leaf = None
    initial_segment: Leaf = None
    erase_before_decay: bool = dataclasses.field(default=False, metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def by_document(self) -> bool:
        """Whether every document of a row has a state of its own."""
        return self.initial_state is not None and self.initial_state.ndim == 5

    @property
    def decay(self) -> Decay:
        """What a decay factor belongs to: a head, a channel of the key or of the value."""
        if self.value_log_decay is not None:
            return "value"
        return "none" if self.log_decay is None else "key" if self.log_decay.ndim == 4 else "head"


def check(
    operation: str, inputs: Recurrence, chunk_size: int | None, state_dims: tuple[int, int] | None = None
) -> None:
    """Checks the inputs of `operation`, whose state is (b, h, *state_dims), (b, h, k, v) if None.

    Raises:
      ValueError: an input does not fit the others, a state comes without the segment that it belongs to, or the chunk
        size is impossible.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"{operation}: q must be (b, t, heads, k) with t at least 1; got {q.shape}")
    if k.shape != q.shape:
        raise ValueError(f"{operation}: k must have q's shape {q.shape}; got {k.shape}")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"{operation}: v must be {q.shape[:2]} + (h, v); got {v.shape}")
    if q.shape[2] < 1 or v.shape[2] % q.shape[2]:
        raise ValueError(f"{operation}: q and k have {q.shape[2]} heads, which must divide the {v.shape[2]} of v")
    sizes = dict(zip("bthvk", (*v.shape, q.shape[3]), strict=True))
    for name, choices in DIMENSIONS.items():
        array = getattr(inputs, name)
        if name in ("q", "k", "v") or array is None:
            continue
        choices = (choices,) if isinstance(choices, str) else choices
        shapes = [tuple(sizes[letter] for letter in choice.split()) for choice in choices]
        if name == "initial_state" and state_dims is not None:
            shapes = [(sizes["b"], sizes["h"], *state_dims)]
        elif name == "initial_state" and inputs.by_document:
            shapes = [(sizes["b"], array.shape[1], *shapes[0][1:])]
        if array.shape not in shapes:
            raise ValueError(f"{operation}: {name} must be {' or '.join(map(str, shapes))}; got {array.shape}")
    needs_erase = {"erase_write": inputs.erase_write is not None, "erase_before_decay": inputs.erase_before_decay}
    for name, present in needs_erase.items():
        if present and inputs.erase_read is None:
            raise ValueError(f"{operation}: {name} without erase_read: there is nothing to erase")
    if inputs.by_document:
        if inputs.segment_ids is None or inputs.initial_segment is not None:
            raise ValueError(f"{operation}: a state per document needs segment_ids, and no initial_segment")
    elif inputs.segment_ids is not None and inputs.initial_state is not None and inputs.initial_segment is None:
        raise ValueError(f"{operation}: initial_state together with segment_ids needs initial_segment (b,)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{operation}: chunk_size must be at least 1; got {chunk_size}")


ONE_STATE = "it begins each row with one state, not one per document (an initial_state of 5 dimensions)"
"""Why kernels refuse states per document."""


def without_padding(inputs: Recurrence) -> Recurrence:
    """Returns inputs whose padding holds zeros and has the segment of the token before it: it decays, erases, writes
    and reads nothing. Without segments the inputs themselves."""
    segment_ids, first = inputs.segment_ids, inputs.initial_segment
    if segment_ids is None:
        return inputs
    # Before any product: what padding holds, NaN included, must not reach a gradient either.
    inputs = map_tokens(inputs, lambda x: zero_padding(x, segment_ids))
    first = jnp.zeros(segment_ids.shape[0], segment_ids.dtype) if first is None else first
    return dataclasses.replace(inputs, segment_ids=carry_segments(segment_ids, first), initial_segment=first)


def with_strength(inputs: Recurrence) -> Recurrence:
    """Returns inputs whose write strength has multiplied v, in fp32 at least, rounded to v's dtype."""
    strength, v = inputs.write_strength, inputs.v
    if strength is None:
        return inputs
    v = (by_channel(strength, jnp.promote_types(v.dtype, jnp.float32)) * v).astype(v.dtype)
    return dataclasses.replace(inputs, v=v, write_strength=None)


def in_whole_chunks(inputs: Recurrence, size: int) -> Recurrence:
    """Returns inputs with tokens at the end, up to a multiple of `size`, that leave the state as it is.

    Their rows are zeros and their segment is the last one; of inputs that have been `without_padding`.
    """
    missing = -inputs.v.shape[1] % size
    if not missing:
        return inputs
    inputs = map_tokens(inputs, lambda x: jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)))
    if inputs.segment_ids is None:
        return inputs
    segments = jnp.pad(inputs.segment_ids, ((0, 0), (0, missing)), mode="edge")
    return dataclasses.replace(inputs, segment_ids=segments)


def by_channel(x: Array, dtype: jax.typing.DTypeLike) -> Array:
    """Returns numbers per head (h,), per token and head (b, t, h) or per channel (b, t, h, d) in a shape that
    broadcasts against (b, t, h, d)."""
    return (x if x.ndim == 4 else x[..., None]).astype(dtype)


def repeat_heads(x: Float[Array, "b t g d"], heads: int) -> Float[Array, "b t h d"]:
    """Returns x with a head for each of `heads`: head i is x's head i // (heads / g)."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def with_decay_per_token(inputs: Recurrence) -> Recurrence:
    """Returns inputs whose log decay, if it was (h,), is (b, t, h)."""
    g = inputs.log_decay
    if g is None or g.ndim > 1:
        return inputs
    return dataclasses.replace(inputs, log_decay=jnp.broadcast_to(g, inputs.v.shape[:3]))


def map_tokens(inputs: Recurrence, function: Callable[[Array], Array]) -> Recurrence:
    """Returns inputs of which every array (b, t, ...) has become function's result of it."""
    inputs = with_decay_per_token(inputs)
    arrays = {name: getattr(inputs, name) for name in PER_TOKEN}
    changed: dict[str, Any] = {name: function(x) for name, x in arrays.items() if x is not None}
    return dataclasses.replace(inputs, **changed)
