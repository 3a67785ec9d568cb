"""The decoder language model: embedding, stack, final norm, head.

The vocabulary is the data's, so it is an argument of `build`, not a field. Parameters are fp32; activations have
`dtype`; logits and losses are fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import Config, UserError
from recollect.layers.mixer import Context, Cursor, MixerConfig, State, document_positions, token_positions
from recollect.layers.modules.linear import Linear, normal, parameter
from recollect.layers.modules.mlp import MlpConfig
from recollect.layers.modules.norms import NormConfig, RMSNorm
from recollect.layers.modules.positions import LearnedPositions, check_length
from recollect.models import landmarks
from recollect.models.stack import Remat, Stack, Stage

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@chz.chz(typecheck=True)
class LanguageModel(Config):
    """A decoder language model.

    Attributes:
      width: model width d.
      stages: mixers over depth; `models.repeat(a, b, depth=12)` cycles through a pattern.
      norm, mlp: of every block; mlp None leaves the MLPs out.
      positions: learned vectors added to the embedding, or None (mixers may have positions of their own).
      tied: the head is the embedding's transpose, else a matrix of its own.
      embedding_dropout: share of the embedding's elements zeroed in training.
      dtype: of activations.
      remat: what a layer's backward pass recomputes: "none" nothing, "dots" all but products with parameters and
        kernels, "full" everything.
      unroll: write repeated layers out instead of scanning over them (slower to compile, easier to debug).
    """

    width: int = 64
    stages: tuple[Stage, ...]
    norm: NormConfig = RMSNorm()
    mlp: MlpConfig | None = None
    positions: LearnedPositions | None = None
    tied: bool = True
    embedding_dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    @chz.validate
    def _possible(self) -> None:
        if self.width < 1:
            raise UserError(f"width={self.width}: must be at least 1")
        if not self.stages:
            raise UserError("a model needs at least one stage")
        if not 0 <= self.embedding_dropout < 1:
            raise UserError(f"embedding_dropout={self.embedding_dropout}: must be in [0, 1)")
        if len({mixer.traits.landmark_block for mixer in self.mixers if mixer.traits.landmark_block}) > 1:
            raise UserError("landmark mixers of one model must have the same block")

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The mixer of every layer, first to last."""
        return tuple(mixer for stage in self.stages for _ in range(stage.repeats) for mixer in stage.pattern)

    @property
    def landmark_block(self) -> int | None:
        """Ordinary tokens before each landmark; None for a model without landmark mixers."""
        return next((mixer.traits.landmark_block for mixer in self.mixers if mixer.traits.landmark_block), None)

    def maximum_length(self) -> int | None:
        """Longest input in ordinary tokens that every part allows; None for any."""
        limits = [mixer.traits.maximum_length for mixer in self.mixers if mixer.traits.maximum_length is not None]
        if self.landmark_block:
            # n ordinary tokens stand among n + n // block; the largest n for which that fits.
            limits = [limit - (limit + 1) // (self.landmark_block + 1) for limit in limits]
        if self.positions is not None:
            limits.append(self.positions.maximum)
        return min(limits, default=None)

    def build(self, vocabulary: int, rngs: nnx.Rngs) -> LanguageModelModule:
        return LanguageModelModule(self, vocabulary, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """hidden (b, t, d) after the final norm; losses and metrics averaged over layers."""

    hidden: jax.Array
    losses: dict[str, jax.Array]
    metrics: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """One state a layer, and the stream's place in ordinary tokens."""

    layers: tuple[State, ...]
    cursor: Cursor


class LanguageModelModule(nnx.Module):
    """What `LanguageModel` builds: whole sequences by calling it, streams by `init_state` and `extend`."""

    def __init__(self, config: LanguageModel, vocabulary: int, rngs: nnx.Rngs):
        self.config = config
        self.embedding = parameter(normal()(rngs.params(), (vocabulary, config.width), jnp.float32))
        self.positions = None if config.positions is None else config.positions.build(config.width, rngs)
        self.landmark = (
            parameter(normal()(rngs.params(), (config.width,), jnp.float32)) if config.landmark_block else None
        )
        self.stack = Stack(
            config.stages, config.norm, config.mlp, config.width, rngs, remat=config.remat, unroll=config.unroll
        )
        self.final_norm = config.norm.build(config.width)
        self.head = None if config.tied else Linear(config.width, vocabulary, rngs)

    def __call__(self, tokens: jax.Array, context: Context = Context()) -> jax.Array:
        """Logits (b, t, vocabulary) fp32 for tokens (b, t)."""
        return self.logits(self.hidden(tokens, context).hidden)

    def hidden(self, tokens: jax.Array, context: Context = Context(), key: jax.Array | None = None) -> ModelOutput:
        """Everything before the head.

        Args:
          tokens: (b, t) int32.
          context: segments of packed documents; positions are counted within them.
          key: for dropout; None in evaluation.
        """
        x, context, place = self._enter(tokens, context, key)
        out = self.stack(x, context)
        return ModelOutput(self._leave(out.hidden, place), out.losses, out.metrics)

    def activations(
        self, tokens: jax.Array, context: Context = Context(), key: jax.Array | None = None
    ) -> Iterator[tuple[str, jax.Array]]:
        """What each part gives, in the order of `hidden`: ("embedding", (b, t, d)), ("layer 0 Attention mixer", ...),
        ("layer 0 Attention mlp", ...), ..., ("final norm", (b, t, d)). A mixer and an MLP give what they add to the
        stream. Arguments as for `hidden`."""
        x, context, place = self._enter(tokens, context, key)
        yield "embedding", x
        last = x
        for index, part, last in self.stack.branches(x, context):
            if part != "sum":
                yield f"layer {index} {type(self.config.mixers[index]).__name__} {part}", last
        yield "final norm", self._leave(last, place)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits (..., vocabulary) fp32 of hidden vectors (..., d)."""
        return jnp.matmul(hidden, self.head_kernel().astype(hidden.dtype), preferred_element_type=jnp.float32)

    def head_kernel(self) -> jax.Array:
        """(d, vocabulary) fp32: the embedding's transpose, or the head's own."""
        return self.embedding[...].T if self.head is None else self.head.kernel[...]

    def init_state(self, batch_size: int, max_length: int) -> ModelState:
        """The state before any token, for streams of at most `max_length` ordinary tokens.

        Raises:
          UserError: a part of the model cannot take streams that long.
        """
        limit = self.config.maximum_length()
        if limit is not None:
            check_length(max_length, limit, "this model's maximum length")
        block = self.config.landmark_block
        longer = max_length if block is None else landmarks.expanded_length(max_length, block)
        return ModelState(
            self.stack.init_state(batch_size, longer, DTYPES[self.config.dtype]), Cursor.start(batch_size)
        )

    def extend(
        self, tokens: jax.Array, state: ModelState, context: Context = Context()
    ) -> tuple[jax.Array, ModelState]:
        """Hidden vectors (b, t, d) of the next tokens (b, t), and the state after them. Tokens of segment 0 are
        padding."""
        b, t = tokens.shape
        fields, cursor = state.cursor.read(context, b, t)
        x = self._embed(tokens, fields, None)
        block = self.config.landmark_block
        if block is None:
            x, layers = self.stack.extend(x, state.layers, fields)
        else:
            assert self.landmark is not None and fields.positions is not None and fields.segments is not None
            place = landmarks.layout(fields.positions, fields.segments, block, from_start=False)
            x, layers = self.stack.extend(landmarks.insert(x, self.landmark[...], place), state.layers, place.context)
            x = landmarks.remove(x, place)
        return self.final_norm(x), ModelState(layers, cursor)

    def _enter(
        self, tokens: jax.Array, context: Context, key: jax.Array | None
    ) -> tuple[jax.Array, Context, landmarks.Layout | None]:
        """What the stack takes: vectors and context, landmarks among them when the model has some, and where those
        stand."""
        b, t = tokens.shape
        limit = self.config.maximum_length()
        if limit is not None:
            check_length(t, limit, "this model's maximum length")
        positions = document_positions(context.segments) if context.segments is not None else context.positions
        context = Context(positions, context.segments, None)
        x = self._embed(tokens, context, key)
        block = self.config.landmark_block
        if block is None:
            return x, context, None
        assert self.landmark is not None
        if context.segments is None:
            place = landmarks.plain_layout(b, t, block)
        else:
            assert positions is not None
            place = landmarks.layout(positions, context.segments, block, from_start=True)
        return landmarks.insert(x, self.landmark[...], place), place.context, place

    def _leave(self, x: jax.Array, place: landmarks.Layout | None) -> jax.Array:
        return self.final_norm(x if place is None else landmarks.remove(x, place))

    def _embed(self, tokens: jax.Array, context: Context, key: jax.Array | None) -> jax.Array:
        x = self.embedding[...][tokens]
        if self.positions is not None:
            x = x + self.positions(token_positions(context, *tokens.shape))
        if key is not None and self.config.embedding_dropout:
            kept = jax.random.bernoulli(key, 1 - self.config.embedding_dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.config.embedding_dropout), 0)
        return x.astype(DTYPES[self.config.dtype])


def state_bytes(state: Any) -> int:
    """Bytes of a state as stored."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
