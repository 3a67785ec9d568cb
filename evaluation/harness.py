"""A model here as a language model of lm-evaluation-harness (lm_eval 0.4.13), an optional package.

    python main.py evaluate RUN --tasks NAME,NAME
    python -m recollect.evaluation.harness --model recollect --model_args run=RUN --tasks NAME    # its own options

The second is the harness's command line with one more model: it finds models by import, and imports none of others'.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from recollect.configuration import UserError
from recollect.configuration.names import nearest
from recollect.models import FunctionalModel, Sampling, continue_texts

Scored = tuple[tuple[str, str], list[int], list[int]]
"""Texts of context and continuation, and their ids."""


@register_model("recollect")
class HarnessModel(TemplateLM):
    """The language model that the harness evaluates.

    Args:
      model, params, tokenizer: of a text run.
      batch_size: texts that are scored, or continued, at once.
      maximum_length: tokens of a context and its continuation; what is before them is cut off. None: the model's own
        limit, or 2048 where it has none.
    """

    def __init__(
        self,
        model: FunctionalModel,
        params: Any,
        tokenizer: Any,
        batch_size: int = 8,
        maximum_length: int | None = None,
    ):
        super().__init__()
        self.model, self.params, self.tokenizer = model, jax.device_put(params), tokenizer
        self.batch_size = int(batch_size)
        limit = model.config.maximum_length()
        self.maximum_length = min(int(maximum_length or limit or 2048), limit or 2**31)
        self._score = jax.jit(self._scores)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: Any = None) -> HarnessModel:
        """Returns the model of `--model_args run=FOLDER,maximum_length=N`."""
        import recollect

        run = recollect.load(str(arg_dict["run"]))
        if run.data.tokenizer is None:
            raise UserError(f"{arg_dict['run']} has no tokenizer; the harness needs a text model")
        size = (additional_config or {}).get("batch_size") or 8
        length = arg_dict.get("maximum_length")
        return cls(run.model, run.params, run.data.tokenizer, int(size), length)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> HarnessModel:
        """Returns the same from "run=FOLDER,maximum_length=N"."""
        pairs = (part.partition("=") for part in arg_string.split(",") if part)
        return cls.create_from_arg_obj({name: value for name, _, value in pairs}, additional_config)

    @property
    def eot_token_id(self) -> int:
        """Returns the token that opens and ends documents."""
        return self.tokenizer.start

    @property
    def tokenizer_name(self) -> str:
        """Returns a name by which requests are cached."""
        return self.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text, the opening one first unless `add_special_tokens` is False."""
        ids = self.tokenizer.encode(string).tolist()
        return ids[1:] if add_special_tokens is False else ids

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of every whole text, each token once, after as many as fit before it."""
        totals = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.maximum_length, 1)
            parts = [((text, ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of every context, up to a stop string, the document's end or `max_gen_toks`."""
        texts = [""] * len(requests)
        asked = [(request.args[0], *_settings(request.args[1])) for request in requests]
        for stops, tokens, temperature in dict.fromkeys(of[1:] for of in asked):
            rows = [row for row, of in enumerate(asked) if of[1:] == (stops, tokens, temperature)]
            for some in _batches(rows, self.batch_size):
                prompts = [self._fitting(asked[row][0], tokens) for row in some]
                sampling = Sampling(temperature=temperature)
                parts = continue_texts(self.model, self.params, self.tokenizer, prompts, tokens, sampling, stops)
                for part in parts:
                    texts[some[part.row]] += part.text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _fitting(self, prompt: str, tokens: int) -> str:
        """Returns the end of a prompt that leaves room for so many tokens."""
        ids = self.tok_encode(prompt)
        room = max(self.maximum_length - tokens, 1)
        return prompt if len(ids) <= room else self.tokenizer.decode(ids[-room + 1 :])

    def _loglikelihood_tokens(self, requests: list[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """Returns the log-probability of every continuation, and whether it is what greedy decoding gives."""
        order = sorted(range(len(requests)), key=lambda row: -len(requests[row][1]) - len(requests[row][2]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for rows in _batches(order, self.batch_size):
            ids = [(requests[row][1] + requests[row][2])[-self.maximum_length - 1 :] for row in rows]
            # Lengths are powers of two, so that few programs are compiled; padding, on the right, changes nothing.
            width = 1 << max(max(map(len, ids)) - 2, 0).bit_length()
            width = min(width, self.maximum_length)
            tokens, targets = np.zeros((2, self.batch_size, width), np.int32)
            for at, of in enumerate(ids):
                tokens[at, : len(of) - 1], targets[at, : len(of) - 1] = of[:-1], of[1:]
            log_probabilities, greedy = jax.device_get(self._score(self.params, tokens, targets))
            for at, row in enumerate(rows):
                end = len(ids[at]) - 1
                part = slice(max(end - len(requests[row][2]), 0), end)
                results[row] = float(log_probabilities[at, part].sum()), bool(greedy[at, part].all())
                if requests[row][0][1]:
                    self.cache_hook.add_partial("loglikelihood", requests[row][0], results[row])
        return results

    def _scores(
        self, params: Any, tokens: Int[Array, "b t"], targets: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
        """Returns the log-probability of every target, and whether it is the likeliest token."""
        module = self.model.bind(params)
        hidden = module.hidden(tokens).hidden

        def of_row(row: tuple[Array, Array]) -> tuple[Array, Array]:
            logits = module.logits(row[0])
            chosen = jnp.take_along_axis(logits, row[1][:, None], axis=-1)[:, 0]
            return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == row[1]

        return jax.lax.map(of_row, (hidden, targets))


def run_tasks(
    model: HarnessModel,
    tasks: Iterable[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns the harness's metrics by task, from `simple_evaluate`.

    Args:
      include: a folder of further tasks (YAML).
      limit: examples of each task; None: all.
      shots: examples before each question; None: as the task has it.

    Raises:
      UserError: no such task, or one whose data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    names = [name for name in tasks if name]
    for name in names:
        if not manager.match_tasks([name]):
            raise UserError(f"tasks={name}: lm_eval has no such task{nearest(name, manager.all_tasks)}")
    settings = {"task_manager": manager, "limit": limit, "num_fewshot": shots, "log_samples": False}
    sizes = {"max_seq_lengths": [model.maximum_length]}
    try:
        done = simple_evaluate(model=model, tasks=names, bootstrap_iters=0, metadata=sizes, **settings)
    except (OSError, ImportError) as error:
        raise UserError(f"tasks={','.join(names)}: data or packages are missing: {error}".splitlines()[0]) from error
    return done["results"]


def _settings(settings: dict[str, Any]) -> tuple[tuple[str, ...], int, float]:
    """Returns stop strings, tokens and temperature of a request."""
    stops = settings.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
    return stops, int(settings.get("max_gen_toks") or 256), temperature


def _batches(rows: list[int], size: int) -> Iterator[list[int]]:
    rest = iter(rows)
    return iter(lambda: list(itertools.islice(rest, size)), [])


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
