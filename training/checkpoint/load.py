"""Opens the newest checkpoint of a run, finished or not: its parameters and config, evaluated or generated from."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import chz
import jax

from recollect.configuration import Config, UserError, apply_overrides, from_json
from recollect.configuration.read_json import read_json
from recollect.data.text.dataset import Text
from recollect.data.tokenizers import Tokenizer
from recollect.models.functional import FunctionalModel, Params, flatten
from recollect.training.checkpoint.integrity import damage
from recollect.training.checkpoint.named_run import run_at
from recollect.training.checkpoint.orbax_folder import Checkpoints
from recollect.training.checkpoint.resume import restore
from recollect.training.checkpoint.saved_data import (
    SavedData,
    check_tokenizer,
    corpus_of,
    read_data,
    vocabulary_of,
    with_tokenizer_of,
)
from recollect.training.evaluator import evaluate
from recollect.training.experiment import Experiment
from recollect.training.run_state import Log
from recollect.training.saved_experiment import as_experiment
from recollect.training.step import program_for


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run's parameters (numpy), the config they belong to (overrides applied), the step, and its checkpoint's data:
    `vocabulary` is the number of token ids, whether the data are still there or not."""

    experiment: Experiment
    params: Params = dataclasses.field(repr=False)
    step: int
    vocabulary: int
    data: SavedData = dataclasses.field(repr=False)

    @functools.cached_property
    def model(self) -> FunctionalModel:
        """The model as functions of its parameters: `run.model.bind(run.params)(tokens)` are logits."""
        return FunctionalModel(self.experiment.model, self.vocabulary)


def load_params(
    directory: Path, *, ema: bool = False, step: int | None = None, log: Log | None = None
) -> tuple[Params, Config, int]:
    """Returns parameters (numpy), config and step of the newest good checkpoint in `directory`.

    Every file of the checkpoint is verified; the structure is read from the file itself, optimizer state is not read. A
    damaged checkpoint is named (`log`, by default on stderr) and left where it is, since a run may be using the folder;
    the one before it is taken.

    Args:
      ema: take the moving average of the parameters where the run kept one.
      step: of the checkpoint; None takes the newest good one.

    Raises:
      UserError: no checkpoint, or all are damaged.
    """

    def parameters(saved: dict[str, Any]) -> dict[str, Any]:
        name = "ema" if ema and "ema" in saved else "params"
        return {name: saved[name]}

    checkpoints = Checkpoints(directory)
    problems = []
    for at in reversed(checkpoints.steps()) if step is None else (step,):
        folder = checkpoints.directory / str(at)
        problem = damage(folder)
        if problem is not None:
            problems.append(f"checkpoint {folder} is damaged: {problem}")
            continue
        for line in problems:
            (log or _to_stderr)(f"{line}; taking step {at}")
        config = from_json(read_json(folder / "meta.json")["config"])
        (params,) = restore(folder, parameters, partial=True).values()
        return jax.device_get(params), config, at
    raise UserError("; ".join(problems) or f"{checkpoints.directory} holds no checkpoint")


def open_run(path: Path | str, overrides: list[str] | None = None) -> SavedRun:
    """Returns the newest checkpoint of the run in `path`, or what an export or a Hugging Face folder there holds.

    Args:
      path: the folder; of a run, maybe followed by the step of another checkpoint, as in "runs/a:500".
      overrides: changes for this use; they must leave the parameters' shapes as they are (data, `retrieve`, ... may
        change).

    Raises:
      UserError: no run there, a damaged checkpoint, or overrides that need other parameters.
    """
    path, at = run_at(path)
    if not path.is_dir():
        problem = ": it is a file; an export or a Hugging Face folder can be given too" if path.exists() else ""
        raise UserError(f"there is no run folder {path}{problem}")
    if (path / "checkpoints").is_dir():
        params, config, step = load_params(path / "checkpoints", ema=True, step=at)
        before = as_experiment(config, f"{path}: its checkpoint")
        data = read_data(path / "checkpoints" / str(step))
    else:
        from recollect.training.checkpoint.exported import open_export

        params, before, step, data = open_export(path)
    experiment = apply_overrides(before, overrides or [])
    check_tokenizer(data, before.data, experiment.data)
    vocabulary = vocabulary_of(data, experiment.data)
    run = SavedRun(experiment, params, step, vocabulary, data)
    saved, expected = (
        {name: leaf.shape for name, leaf in flatten(tree).items()} for tree in (params, run.model.abstract_params())
    )
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise UserError(
                f"{path}: the parameters do not fit this config: {name} "
                f"({saved.get(name)} there, {expected.get(name)} asked for)"
            )
    return run


def evaluate_run(
    path: Path,
    overrides: list[str],
    log: Log | None = None,
    *,
    prefill: int | None = None,
    search: list[str] | None = None,
) -> dict[str, Any]:
    """Returns metrics of the newest checkpoint on its (or the overridden) evaluation data, and which corpus that is;
    logs (by default on stderr) that it is another than the run was trained on. `prefill` None gives the model whole
    sequences; a number streams them (training/streamed_evaluation.py), after a search where `search` is the
    `field=value` of its config (training/searched_evaluation.py)."""
    if prefill is None and any(".cache" in override.partition("=")[0] for override in overrides):
        raise UserError("a cache policy acts in decoding alone: add --streamed, which evaluates through it")
    run = open_run(path, overrides)
    if isinstance(run.experiment.data, Text) and run.data.digest is None and "source=" not in " ".join(overrides):
        raise UserError(f"{path}: a model that was imported names no text; give some with data.source=")
    experiment = chz.replace(run.experiment, data=with_tokenizer_of(run.data, run.experiment.data))
    corpus = corpus_of(run.data, experiment.data, f"{path}", log or _to_stderr)
    if prefill is None:
        metrics = evaluate(program_for(experiment), run.params, experiment.run.seed, final=True)
    elif search is not None:
        from recollect.training.searched_evaluation import Search, evaluate_searched

        metrics = evaluate_searched(experiment, run.params, prefill, apply_overrides(Search(), search))
    else:
        from recollect.training.streamed_evaluation import evaluate_streamed

        metrics = evaluate_streamed(experiment, run.params, prefill)
    return {"name": experiment.name, "step": run.step, **corpus, **metrics}


def open_text_run(path: Path | str, overrides: list[str] | None = None) -> tuple[FunctionalModel, Params, Tokenizer]:
    """Returns model, parameters and tokenizer of a text run's newest checkpoint, for `models.continue_texts`.

    Raises:
      UserError: the run is no text model's, or what `open_run` refuses.
    """
    run = open_run(path, overrides)
    data = run.experiment.data
    tokenizer = run.data.tokenizer
    if tokenizer is None and (run_at(path)[0] / "checkpoints").is_dir():  # one of an earlier version
        tokenizer = data.open_tokenizer()
    if tokenizer is None:
        raise UserError(f"{path} is a {type(data).__name__} run without a tokenizer; generate needs a text model")
    return run.model, run.params, tokenizer


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
