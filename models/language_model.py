"""The decoder language model: embedding, stack, final norm, head.

The vocabulary is the data's, so it is an argument of `build`, not a field. Parameters are fp32; activations have
`dtype`; logits and losses are fp32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import Config, UserError, at_least
from recollect.layers.mixer import Context, Cursor, MixerConfig, MixerOutput, State, check_length
from recollect.layers.modules.dropout import dropped, is_share
from recollect.layers.modules.initialisation import Initialisation
from recollect.layers.modules.linear import Linear, embedding_init, initialised_by, parameter
from recollect.layers.modules.mlp import MlpConfig
from recollect.layers.modules.norms import NormConfig, RMSNorm
from recollect.layers.modules.positions import LearnedPositions
from recollect.layers.packing import document_positions, token_positions
from recollect.layers.state.capacity import check_capacity, check_positions
from recollect.models import landmarks
from recollect.models.canon import Canon
from recollect.models.lora import LoRA
from recollect.models.rematerialisation import Remat
from recollect.models.stack import Stack, Stage

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
      initialisation: of matrices and embeddings where a layer does not prescribe its own; None: N(0, 0.02), and N(0,
        0.02 / sqrt(2 layers)) into the residual stream.
      embedding_scale: multiplies the embedding where it enters the stack, not as the head.
      embedding_dropout: share of the embedding's elements zeroed in training.
      dtype: dtype of activations.
      remat: what a layer's backward pass recomputes: "none" nothing, "dots" all but products with parameters and
        kernels, "full" everything.
      canon: short convolutions in every block, see there; None has none.
      lora: low-rank updates of linear maps, trained alone unless asked; None has none.
      unroll: write repeated layers out instead of scanning over them (slower to compile, and faster to train on a GPU).
    """

    width: int = chz.field(default=64, validator=at_least(1))
    stages: tuple[Stage, ...]
    norm: NormConfig = RMSNorm()
    mlp: MlpConfig | None = None
    positions: LearnedPositions | None = None
    tied: bool = True
    initialisation: Initialisation | None = None
    embedding_scale: float = 1.0
    embedding_dropout: float = chz.field(default=0.0, validator=is_share)
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    canon: Canon | None = None
    lora: LoRA | None = None
    unroll: bool = False

    @chz.validate
    def _possible(self) -> None:
        if not self.stages:
            raise UserError("a model needs at least one stage")
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

    @property
    def predicts_landmarks(self) -> bool:
        """Whether the head has a column for landmarks."""
        return any(getattr(mixer, "predicted", False) for mixer in self.mixers)

    def maximum_length(self) -> int | None:
        """Returns the longest input in ordinary tokens that every part allows; None for any."""
        limits = [mixer.traits.maximum_length for mixer in self.mixers if mixer.traits.maximum_length is not None]
        if self.landmark_block:
            limits = [landmarks.ordinary_length(limit, self.landmark_block) for limit in limits]
        if self.positions is not None:
            limits.append(self.positions.maximum)
        return min(limits, default=None)

    def build(self, vocabulary: int, rngs: nnx.Rngs) -> LanguageModelModule:
        """Returns the module for a vocabulary of this size."""
        with initialised_by(self.initialisation):
            return LanguageModelModule(self, vocabulary, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """One state per layer, and where the stream stands in ordinary tokens."""

    layers: tuple[State, ...]
    cursor: Cursor


class LanguageModelModule(nnx.Module):
    """The module of `LanguageModel`: whole sequences by calling it, streams by `init_state` and `extend`."""

    def __init__(self, config: LanguageModel, vocabulary: int, rngs: nnx.Rngs):
        self.config = config
        self.embedding = parameter(embedding_init()(rngs.params(), (vocabulary, config.width), jnp.float32), "z d")
        self.positions = None if config.positions is None else config.positions.build(config.width, rngs)
        self.landmark = landmarks.vector(config.width, rngs) if config.landmark_block else None
        apart = config.predicts_landmarks and not config.tied
        self.landmark_head = landmarks.vector(config.width, rngs) if apart else None
        self.stack = Stack(config, rngs)
        self.final_norm = config.norm.build(config.width)
        self.head = None if config.tied else Linear(config.width, vocabulary, "d z", rngs)

    def __call__(self, tokens: Int[Array, "b t"], context: Context = Context()) -> Float[Array, "b t z"]:
        """Returns logits, fp32."""
        return self.logits(self.hidden(tokens, context).hidden)

    def hidden(self, tokens: Int[Array, "b t"], context: Context = Context()) -> MixerOutput:
        """Returns what the head takes, the hidden vectors after the final norm, with losses and metrics averaged over
        layers. `context` holds the segments of packed documents, and in training the key of dropout."""
        x, context, layout = self.enter(tokens, context)
        out = self.stack(x, context)
        if layout is not None and self.config.predicts_landmarks:
            from recollect.models.landmark_prediction import with_loss

            out = with_loss(self, out, layout, context)
        return dataclasses.replace(out, hidden=self.leave(out.hidden, layout))

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows z"]:
        """Returns the logits of hidden vectors, fp32."""
        kernel = self.head_kernel()[:, : self.embedding.shape[0]]
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def head_kernel(self) -> Float[Array, "d z"]:
        """Returns the head's matrix, fp32: the embedding's transpose where they are tied. Predicted landmarks have a
        last column."""
        kernel = self.embedding[...].T if self.head is None else self.head.kernel[...]
        column: Any = self.landmark if self.landmark_head is None else self.landmark_head
        return jnp.column_stack([kernel, column[...]]) if self.config.predicts_landmarks else kernel

    def init_state(self, batch_size: int, max_length: int) -> ModelState:
        """Returns the state before any token, for streams of at most `max_length` ordinary tokens; raises UserError
        where a part of the model cannot take streams that long."""
        check_length(max_length, self.config.maximum_length(), "this model's maximum length")
        block = self.config.landmark_block
        longer = landmarks.expanded_length(max_length, block) if block else max_length
        layers = self.stack.init_state(batch_size, longer, DTYPES[self.config.dtype])
        return ModelState(layers, Cursor.start(batch_size))

    def extend(
        self, tokens: Int[Array, "b t"], state: ModelState, context: Context = Context()
    ) -> tuple[Float[Array, "b t d"], ModelState]:
        """Returns the hidden vectors of the next tokens, and the state after them. Tokens of segment 0 are padding.

        Tokens for which the state has no room raise UserError before any layer runs; inside jit they are dropped, and
        the next call outside of it raises (layers/state/capacity.py).
        """
        fields, cursor = state.cursor.read(dataclasses.replace(context, token_ids=tokens), *tokens.shape)
        check_positions(state.cursor, fields, None if self.config.positions is None else self.config.positions.maximum)
        x, fields, layout = self._with_landmarks(self._embed(tokens, fields), fields, from_start=False)
        check_capacity(state.layers, fields.segments, "tokens" if layout is None else "tokens, landmarks counted")
        x, layers = self.stack.extend(x, state.layers, fields)
        return self.leave(x, layout), ModelState(layers, cursor)

    def enter(
        self, tokens: Int[Array, "b t"], context: Context
    ) -> tuple[Float[Array, "b longer d"], Context, landmarks.Layout | None]:
        """Returns what the stack takes: vectors and context, with landmarks if the model has them, and their layout."""
        check_length(tokens.shape[1], self.config.maximum_length(), "this model's maximum length")
        positions = document_positions(context.segments) if context.segments is not None else context.positions
        context = dataclasses.replace(context, positions=positions, token_ids=tokens)
        return self._with_landmarks(self._embed(tokens, context), context, from_start=True)

    def leave(self, x: Float[Array, "b longer d"], layout: landmarks.Layout | None) -> Float[Array, "b t d"]:
        """Returns what the head takes from the stack's output."""
        return self.final_norm(x if layout is None else landmarks.remove(x, layout))

    def _with_landmarks(
        self, x: Float[Array, "b t d"], context: Context, *, from_start: bool
    ) -> tuple[Float[Array, "b longer d"], Context, landmarks.Layout | None]:
        """Returns vectors and context as they are, or with landmarks inserted, and where these stand."""
        block = self.config.landmark_block
        if self.landmark is None or block is None:
            return x, context, None
        how = {"from_start": from_start, "predicted": self.config.predicts_landmarks}
        layout = landmarks.layout_of(context, x.shape[0], x.shape[1], block, **how)
        return landmarks.insert(x, self.landmark[...], layout), layout.context, layout

    def _embed(self, tokens: Int[Array, "b t"], context: Context) -> Float[Array, "b t d"]:
        x = self.embedding[...][tokens] * self.config.embedding_scale
        if self.positions is not None:
            x = x + self.positions(token_positions(context, *tokens.shape))
        if context.key is not None:
            x = dropped(x, self.config.embedding_dropout, context.key)
        return x.astype(DTYPES[self.config.dtype])


def state_bytes(state: Any) -> int:
    """Returns the bytes of a state as stored."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
