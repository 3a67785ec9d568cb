"""The language model: embedding, stack, final norm, head; beside them an encoder, continuous inputs, classes.

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
from recollect.layers.context import Context, Source
from recollect.layers.mixer import Cursor, MixerConfig, MixerOutput, check_length
from recollect.layers.modules.dropout import dropped, is_share
from recollect.layers.modules.initialisation import Initialisation
from recollect.layers.modules.linear import Linear, embedding_init, initialised_by, parameter
from recollect.layers.modules.mlp import MlpConfig
from recollect.layers.modules.norms import NormConfig, RMSNorm
from recollect.layers.modules.positions import LearnedPositions
from recollect.layers.packing import document_positions, token_positions
from recollect.models import landmarks
from recollect.models.canon import Canon
from recollect.models.classifier import Classifier
from recollect.models.encoder import Encoder, encode
from recollect.models.lora import LoRA
from recollect.models.projector import Projector
from recollect.models.rematerialisation import Remat
from recollect.models.stack import Stack, Stage
from recollect.models.streams import ModelState, ModelStreams

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@chz.chz(typecheck=True)
class LanguageModel(Config):
    """A language model: a decoder; an encoder, where mixers have causal=False; or both (`encoder`).

    Attributes:
      width: model width d.
      stages: mixers over depth; `models.repeat(a, b, depth=12)` cycles through a pattern.
      norm, mlp: of every block; mlp None leaves the MLPs out.
      positions: learned vectors added to the embedding, or None (mixers may have positions of their own).
      tied: the head is the embedding's transpose, else a matrix of its own.
      residual: what mixers and MLPs are added to, the "stream" or, as in MiniMax-01, the "normalised" one they read.
      initialisation: of matrices and embeddings where a layer has none of its own; None: see `output_init`.
      embedding_scale: multiplies the embedding where it enters the stack, not as the head.
      embedding_dropout: share of the embedding's elements zeroed in training.
      dtype: dtype of activations.
      remat: what a layer's backward pass recomputes: nothing, all but products ("dots") and kernels, or everything.
      canon: short convolutions in every block, see there; None has none.
      lora: low-rank updates of linear maps, trained alone unless asked; None has none.
      encoder: what reads the source of mixers with cross=True.
      projector: what maps `Context.vectors` to where tokens are of type PERCEPT.
      classifier: a prediction per row in place of one per token.
      unroll: write repeated layers out instead of scanning over them (slower to compile, and faster to train on a GPU).
    """

    width: int = chz.field(default=64, validator=at_least(1))
    stages: tuple[Stage, ...]
    norm: NormConfig = RMSNorm()
    mlp: MlpConfig | None = None
    positions: LearnedPositions | None = None
    tied: bool = True
    residual: Literal["stream", "normalised"] = "stream"
    initialisation: Initialisation | None = None
    embedding_scale: float = 1.0
    embedding_dropout: float = chz.field(default=0.0, validator=is_share)
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    canon: Canon | None = None
    lora: LoRA | None = None
    encoder: Encoder | None = None
    projector: Projector | None = None
    classifier: Classifier | None = None
    unroll: bool = False

    @chz.validate
    def _possible(self) -> None:
        if not self.stages:
            raise UserError("a model needs at least one stage")
        if len({mixer.traits.landmark_block for mixer in self.mixers if mixer.traits.landmark_block}) > 1:
            raise UserError("landmark mixers of one model must have the same block")
        crosses = any(mixer.traits.cross for mixer in self.mixers)
        if crosses != (self.encoder is not None) or (crosses and self.canon is not None):
            raise UserError("mixers with cross=True need model.encoder, it needs them, and canon=None")

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

    @property
    def sees_targets(self) -> bool:
        """Whether the prediction of a token sees later ones."""
        return self.classifier is None and not all(mixer.traits.causal for mixer in self.mixers)

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


class LanguageModelModule(ModelStreams):
    """The module of `LanguageModel`: whole sequences by calling it, streams by `init_state` and `extend`."""

    def __init__(self, config: LanguageModel, vocabulary: int, rngs: nnx.Rngs):
        self.config = config
        self.embedding = parameter(embedding_init()(rngs.params(), (vocabulary, config.width), jnp.float32), "z d")
        self.positions = None if config.positions is None else config.positions.build(config.width, rngs)
        self.landmark = landmarks.vector(config.width, rngs) if config.landmark_block else None
        apart = config.predicts_landmarks and not config.tied
        self.landmark_head = landmarks.vector(config.width, rngs) if apart else None
        stack = Stack
        if any(getattr(mixer, "value_residual", False) for mixer in config.mixers):
            from recollect.models.value_stack import ValueStack as stack
        self.stack = stack(config, rngs)
        self.final_norm = config.norm.build(config.width)
        self.encoder = None if config.encoder is None else config.encoder.build(config, rngs)
        self.projector = None if config.projector is None else config.projector.build(config.width, rngs)
        self.classifier = None if config.classifier is None else config.classifier.build(config.width, rngs)
        self.head = None if config.tied else Linear(config.width, vocabulary, "d z", rngs)

    def __call__(self, tokens: Int[Array, "b t"], context: Context = Context()) -> Float[Array, "b _ z"]:
        """Returns logits, fp32: of each token, or with a classifier of each row."""
        return self.logits(self.hidden(tokens, context).hidden)

    def hidden(self, tokens: Int[Array, "b t"], context: Context = Context()) -> MixerOutput:
        """Returns what the head takes, the hidden vectors after the final norm, with losses and metrics averaged over
        layers. `context` holds the segments of packed documents, and in training the key of dropout."""
        x, entered, layout = self.enter(tokens, context)
        out = self.stack(x, entered)
        if layout is not None and self.config.predicts_landmarks:
            from recollect.models.landmark_prediction import with_loss

            out = with_loss(self, out, layout, entered)
        x = self.leave(out.hidden, layout)
        return dataclasses.replace(out, hidden=x if self.classifier is None else self.classifier(x, context.segments))

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows z"]:
        """Returns the logits of hidden vectors, fp32."""
        kernel = self.head_kernel()[:, : -1 if self.config.predicts_landmarks else None]
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def head_kernel(self) -> Float[Array, "d z"]:
        """Returns the head's matrix, fp32: the embedding's transpose where they are tied. Predicted landmarks have a
        last column."""
        if self.classifier is not None:
            return self.classifier.head.kernel[...]
        kernel = self.embedding[...].T if self.head is None else self.head.kernel[...]
        column: Any = self.landmark if self.landmark_head is None else self.landmark_head
        return jnp.column_stack([kernel, column[...]]) if self.config.predicts_landmarks else kernel

    def init_state(self, batch_size: int, max_length: int, source: Source | None = None) -> ModelState:
        """Returns the state before any token, for streams of at most `max_length` ordinary tokens beside a `source`, if
        the model has an encoder; raises UserError where a part of the model cannot take streams that long."""
        check_length(max_length, self.config.maximum_length(), "this model's maximum length")
        block = self.config.landmark_block
        longer = landmarks.expanded_length(max_length, block) if block else max_length
        source = None if self.encoder is None else encode(self, source)
        layers = self.stack.init_state(batch_size, longer, DTYPES[self.config.dtype], source)
        return ModelState(layers, Cursor.start(batch_size))

    def enter(
        self, tokens: Int[Array, "b t"], context: Context
    ) -> tuple[Float[Array, "b longer d"], Context, landmarks.Layout | None]:
        """Returns what the stack takes: vectors and context, with landmarks if the model has them, and their layout."""
        check_length(tokens.shape[1], self.config.maximum_length(), "this model's maximum length")
        positions = document_positions(context.segments) if context.segments is not None else context.positions
        source = None if self.encoder is None else encode(self, context.source)
        context = dataclasses.replace(context, positions=positions, token_ids=tokens, source=source)
        x = self._embed(tokens, context)
        return (x, context, None) if self.landmark is None else landmarks.inserted(self, x, context, from_start=True)

    def leave(self, x: Float[Array, "b longer d"], layout: landmarks.Layout | None) -> Float[Array, "b t d"]:
        """Returns what the head takes from the stack's output."""
        return self.final_norm(x if layout is None else landmarks.remove(x, layout))

    def _embed(self, tokens: Int[Array, "b t"], context: Context) -> Float[Array, "b t d"]:
        x = self.embedding[...][tokens] * self.config.embedding_scale
        if self.projector is not None:
            x = self.projector(x, context)
        if self.positions is not None:
            x = x + self.positions(token_positions(context, *tokens.shape))
        if context.key is not None:
            x = dropped(x, self.config.embedding_dropout, context.key)
        return x.astype(DTYPES[self.config.dtype])


def state_bytes(state: Any) -> int:
    """Returns the bytes of a state as stored."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
