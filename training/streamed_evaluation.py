"""Evaluation through decoding states: tokens are given to `extend` one by one after a prefill, as in generation. So
cache policies can be scored, and what decoding costs is measured beside what it yields."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.layers.mixer import Context, MixerOutput
from recollect.layers.state import measured_reads
from recollect.models.functional import Params, state_bytes_at
from recollect.training.evaluator import evaluate
from recollect.training.experiment import Experiment
from recollect.training.loss import losses
from recollect.training.scored_module import ScoredModule
from recollect.training.step import Program


def evaluate_streamed(experiment: Experiment, params: Params, prefill: int) -> dict[str, Any]:
    """Returns the metrics of `evaluate`, of a model that gets the first `prefill` tokens at once and then one by one;
    and what it costs: "state_bytes" by length, all arrays of one sequence's decoding state, and "keys_read", the keys
    that a token after the prefill reads: a mean over tokens and key heads, summed over layers; and where layers choose
    among all keys "mass_kept", the share of the probability of full attention that the chosen ones hold: a mean over
    tokens, query heads and those layers.

    Raises:
      UserError: the prefill leaves no token, or a mixer cannot stream.
    """
    check_streams(experiment, prefill)
    metrics = evaluate(StreamedProgram(experiment, prefill), params, experiment.run.seed, final=True)
    data = experiment.data
    return metrics | {"state_bytes": state_bytes_at(experiment.model, data.vocabulary, data.lengths)}


def check_streams(experiment: Experiment, prefill: int) -> None:
    """Raises UserError where the prefill leaves no token, or a mixer cannot stream."""
    shortest = min(experiment.data.lengths)
    if not 0 <= prefill < shortest:
        raise UserError(f"--prefill {prefill}: must leave a token of the shortest sequences, which have {shortest}")
    still = [type(mixer).__name__ for mixer in experiment.model.mixers if not mixer.traits.streams]
    if still:
        raise UserError(f"--streamed needs mixers that stream; {still[0]} does not")


class StreamedProgram(Program):
    """A program that evaluates through decoding states."""

    def __init__(self, experiment: Experiment, prefill: int):
        super().__init__(experiment)
        self.prefill = prefill

    def losses_of(self, params: Params, batch: Batch, weights: jax.Array, key: jax.Array | None = None) -> Any:
        module: Any = StreamedModule(self.model.bind(params), self.prefill)
        return losses(module, batch, weights, self.experiment.loss, key)

    def measured(self, out: MixerOutput) -> dict[str, Any]:
        return {name: (total, out.metrics["tokens"]) for name, total in out.metrics.items() if name != "tokens"}


@dataclasses.dataclass(frozen=True)
class StreamedModule(ScoredModule):
    """What `losses` takes of a model, computed by streaming whole batches."""

    prefill: int

    def hidden(self, tokens: Int[Array, "b t"], context: Context) -> MixerOutput:
        """Returns the hidden vectors of tokens that are given one by one, but for those of the prefill; as metrics
        their number without padding, and sums over them of what `evaluate_streamed` returns means of."""
        if any(known is not None for known in (context.token_types, context.fields, context.vectors, context.source)):
            raise UserError("--streamed gives plain tokens, and this task's have types, fields, vectors or a source")
        b, t = tokens.shape
        segments = jnp.ones_like(tokens) if context.segments is None else context.segments
        # Behind the barrier the empty state is no constant: XLA folded what is read from it, for minutes.
        state: Any = jax.lax.optimization_barrier(self.module.init_state(b, t))
        first: list[jax.Array] = []
        if self.prefill:
            now = slice(0, self.prefill)
            out, state = self.module.extend(tokens[:, now], state, Context(segments=segments[:, now]))
            first = [out]

        def step(state: Any, part: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            tokens, segments = (x[:, None] for x in part)
            with measured_reads() as layers:
                out, state = self.module.extend(tokens, state, Context(segments=segments))
            measured = {"keys_read": sum((reads.keys for reads in layers), jnp.zeros(b))}
            if shares := [reads.mass for reads in layers if reads.mass is not None]:
                measured["mass_kept"] = sum(shares, jnp.zeros(b)) / len(shares)
            return state, (out[:, 0], {name: jnp.sum(rows * (part[1] != 0)) for name, rows in measured.items()})

        rest = (x[:, self.prefill :].T for x in (tokens, segments))
        _, (out, measured) = jax.lax.scan(step, state, tuple(rest))
        number = jnp.sum(segments[:, self.prefill :] != 0, dtype=jnp.float32)
        hidden = jnp.concatenate([*first, jnp.moveaxis(out, 0, 1)], axis=1)
        return MixerOutput(hidden, metrics=jax.tree.map(jnp.sum, measured) | {"tokens": number})
