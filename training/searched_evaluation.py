"""Evaluation of models that search a task's context window by window (models/infini_retri.py), then answer after what
they kept of it, token by token as in training/streamed_evaluation.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.layers.mixer import Context, MixerOutput
from recollect.models.functional import Params, state_bytes_at
from recollect.models.infini_retri import InfiniRetri, KeptTokens, retrieve_sentences
from recollect.models.language_model import state_bytes
from recollect.training.evaluator import evaluate
from recollect.training.experiment import Experiment
from recollect.training.loss import losses
from recollect.training.streamed_evaluation import StreamedModule, StreamedProgram, check_streams


@chz.chz(typecheck=True)
class Search(InfiniRetri):
    """How the context of a task's examples, the tokens of the prefill, is searched.

    Attributes:
      question: tokens after the prefill that ask; those after them answer, and are not seen by the search.
      sentence: tokens of a sentence: the context is cut into such.
    """

    question: int = chz.field(default=1, validator=at_least(1))
    sentence: int = chz.field(default=8, validator=at_least(1))


def evaluate_searched(experiment: Experiment, params: Params, prefill: int, search: Search) -> dict[str, Any]:
    """Returns what `evaluate_streamed` does. "state_bytes" are of the ids kept and of the decoding state behind them;
    "keys_read" is a mean over the tokens after the prefill, those that the question's read in the search included.

    Raises:
      UserError: the prefill leaves no token, a mixer cannot stream, the model has no scores to search by, or the data
        asks before the question's end.
    """
    data: Any = experiment.data
    check_streams(experiment, prefill)
    if not data.made_on_device:
        raise UserError(f"a search needs examples with a context and a question; {type(data).__name__} has none")
    for part in data.evaluation_slices():
        asked = data.evaluation_batch(0, 0, part, 1)
        first = -1 if asked.target_positions is None else int(jnp.min(asked.target_positions))
        if first < prefill + search.question - 1 or asked.segments is not None:
            raise UserError(
                f"--prefill {prefill}, question={search.question}: in slice {part.name} token {first} is to be "
                "answered already, or documents are packed"
            )
    metrics = evaluate(SearchedProgram(experiment, prefill, search), params, experiment.run.seed, final=True)
    kept = prefill if prefill <= search.window else search.budget
    lengths = {length: kept + length - prefill for length in data.lengths}
    behind = state_bytes_at(experiment.model, data.vocabulary, list(lengths.values()))
    ids = 0 if prefill <= search.window else state_bytes(KeptTokens.none(1, search.budget))
    return metrics | {"state_bytes": {str(length): ids + behind[str(short)] for length, short in lengths.items()}}


class SearchedProgram(StreamedProgram):
    """A program that evaluates after a search."""

    def __init__(self, experiment: Experiment, prefill: int, search: Search):
        super().__init__(experiment, prefill)
        self.search = search

    def losses_of(self, params: Params, batch: Batch, weights: jax.Array, key: jax.Array | None = None) -> Any:
        module: Any = _SearchedModule(self.model.bind(params), self.prefill, self, params)
        return losses(module, batch, weights, self.experiment.loss, key)


@dataclasses.dataclass(frozen=True)
class _SearchedModule(StreamedModule):
    program: SearchedProgram
    params: Params

    def hidden(self, tokens: Int[Array, "b t"], context: Context) -> MixerOutput:
        """Returns the hidden vectors of the tokens after the prefill, and zeros for it."""
        search, (context_tokens, rest) = self.program.search, jnp.split(tokens, [self.prefill], axis=1)
        sentences = jnp.broadcast_to(jnp.arange(self.prefill) // search.sentence, context_tokens.shape)
        question = rest[:, : search.question]
        kept, read = retrieve_sentences(self.program.model, self.params, context_tokens, sentences, question, search)
        shorter = jnp.concatenate([kept.tokens, rest], axis=1)
        segments = jnp.concatenate([kept.valid, jnp.ones(rest.shape, bool)], axis=1).astype(jnp.int32)
        streamed = StreamedModule(self.module, kept.tokens.shape[1])
        out = streamed.hidden(shorter, dataclasses.replace(context, segments=segments))
        after = out.hidden[:, kept.tokens.shape[1] :]
        hidden = jnp.pad(after, ((0, 0), (self.prefill, 0), (0, 0)))
        keys_read = out.metrics["keys_read"] + jnp.sum(read)
        return dataclasses.replace(out, hidden=hidden, metrics={**out.metrics, "keys_read": keys_read})
