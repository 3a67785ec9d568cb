"""Training on streams: the model's state after a batch is what comes before the next one's rows.

Transformer-XL's memory (Dai et al. 2019, section 3.2), for every mixer whose state has a fixed size: rows of a batch go
on where those of the batch before ended (`data.sequences=Streams()`), tokens of a row are mixed by `extend` from the
state that the last step left, and no gradient flows into that state. It is part of the train state, so a run goes on
from a checkpoint with the same bits. Evaluation reads held-out rows from their beginnings, as without it.

Differs from the paper: what is kept are keys and values, made with the parameters of the step that saw their tokens,
not the inputs of layers; the first row of an epoch follows the last one of the epoch before. A step that is skipped
leaves the state as it was, and batches that a rollback leaves out (`run.spikes`) are missing from it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.data.text.rows import Streams
from recollect.layers.mixer import Context, MixerOutput
from recollect.layers.state.capacity import bounded_parts
from recollect.models.functional import Params
from recollect.models.streams import ModelState
from recollect.training.experiment import Experiment
from recollect.training.loss import losses
from recollect.training.scored_module import ScoredModule
from recollect.training.step import Metrics, Program, State

ENDLESS = 2**30
"""Tokens of a stream that no state with a slot per token should be made for."""


class CarryingProgram(Program):
    """A program whose train state has "carried": the arrays of the model's state after the last step's batch."""

    def __init__(self, experiment: Experiment, population: int | None = None):
        super().__init__(experiment, population)
        check(self)
        stream = self._abstract_stream()
        for mixer, layer in zip(experiment.model.mixers, stream.layers, strict=True):
            if bounded_parts(layer):
                name = type(mixer).__name__
                raise UserError(
                    f"run.carry_state=True needs states of a fixed size; {name} keeps every token: set a window"
                )
        self._structure = jax.tree.structure(stream)

    def _init(self, seed: jax.Array) -> State:
        state = super()._init(seed)
        stream = self.model.bind(state["params"]).init_state(self.experiment.run.batch_size, ENDLESS)
        return {**state, "carried": jax.tree.leaves(stream)}

    def step(self, state: State, values: Any, batch: Batch) -> tuple[State, Metrics]:
        before = jax.tree.unflatten(self._structure, state["carried"])
        after, metrics = super().step(state, values, _StreamBatch(**vars(batch), before=before))
        carried = jax.tree.leaves(metrics.pop("carried"))
        skipped = metrics["skipped"] > 0
        kept = [jnp.where(skipped, old, new) for old, new in zip(state["carried"], carried, strict=True)]
        return {**after, "carried": kept}, metrics

    def losses_of(self, params: Params, batch: Batch, weights: jax.Array, key: jax.Array | None = None) -> Any:
        module: Any = self.model.bind(params)
        if isinstance(batch, _StreamBatch):
            module = _ContinuedModule(module, batch.before)
        return losses(module, batch, weights, self.experiment.loss, key)

    def _abstract_stream(self) -> ModelState:
        batch_size = self.experiment.run.batch_size
        return jax.eval_shape(
            lambda params: self.model.bind(params).init_state(batch_size, ENDLESS), self.model.abstract_params()
        )


def check(program: CarryingProgram) -> None:
    """Raises UserError where states cannot be carried from batch to batch."""
    experiment = program.experiment
    model, data, run = experiment.model, experiment.data, experiment.run
    still = [type(mixer).__name__ for mixer in model.mixers if not mixer.traits.streams or mixer.traits.cross]
    problems = {
        "needs data.sequences=Streams(), whose batches go on where the last ones ended": (
            not isinstance(getattr(data, "sequences", None), Streams)
        ),
        f"needs mixers that stream; {still[0] if still else None} does not": bool(still),
        "needs a model without tables of positions, which streams outgrow": model.maximum_length() is not None,
        "needs run.accumulate=1: the rows of a batch are its streams": run.accumulate > 1,
        "runs on one device; run.mesh has more": run.mesh.devices > 1,
        'needs model.remat="none": layers run one after another, as in decoding': model.remat != "none",
        "needs a model without dropout, which decoding has not": program.dropout_key(0, 0) is not None,
    }
    for problem, there in problems.items():
        if there:
            raise UserError(f"run.carry_state=True {problem}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _StreamBatch(Batch):
    """A batch, and the model's state before its tokens."""

    before: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _StateAfter:
    """Carries the state after a batch out of the loss, as sums over tokens are."""

    state: ModelState

    def formed(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns no losses, and the state among the metrics."""
        return {}, {"carried": self.state}


@dataclasses.dataclass(frozen=True)
class _ContinuedModule(ScoredModule):
    """What `losses` takes of a model, whose tokens come after `before`."""

    before: ModelState

    def hidden(self, tokens: Int[Array, "b t"], context: Context) -> MixerOutput:
        """Returns the hidden vectors of the next tokens; as `sums` the state after them."""
        out, state = self.module.extend(tokens, self.before, context)
        return MixerOutput(out, sums=_StateAfter(state))
