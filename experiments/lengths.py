"""What is recalled from contexts many times longer than those of training, by reading all of them or less.

    python -m recollect.experiments.lengths runs/lengths [--lengths 512,1024,2048,4096] [--only READER]

Two models learn the passkey at 256 tokens, one of softmax attention without positions and one with landmarks, which are
then read by each of READERS: caches of 256 tokens, searches for as many, landmarks' retrieval, InfiniRetri. The context
comes at once, then the question and its answer token by token. Writes lengths.json, lengths.csv and lengths.png; what
lengths.json holds is not measured again.

Setting: a convolution, then the mixer with 2 heads, no MLP; width 64, batch 32, AdamW at 5e-3. Three of four calls are
of 32 tokens: a needle in 256 is found after many times as many steps without them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import chz

from recollect.configuration import apply_overrides
from recollect.configuration.console import exit_code
from recollect.data.synthetics import ruler
from recollect.data.synthetics.task import Slice
from recollect.evaluation.plots import accuracy_by_depth
from recollect.experiments.measurements import Measurements, Row, write_rows
from recollect.layers import Attention, BaseConvolution, Landmark
from recollect.layers.mixer import MixerConfig
from recollect.layers.modules import LayerNorm
from recollect.models import LanguageModel, repeat
from recollect.training.checkpoint.load import SavedRun, open_run
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW
from recollect.training.searched_evaluation import Search, evaluate_searched
from recollect.training.streamed_evaluation import evaluate_streamed
from recollect.training.train import train

TRAINED, BUDGET = 256, 256
"""Tokens of the longest contexts in training, and of what is kept, or read, of longer ones."""

LENGTHS = (512, 1024, 2048, 4096)
TOKENS_AT_ONCE, TOKENS = 32_768, 131_072
"""Tokens of a batch, and at most of all examples of a length."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a context is read.

    Attributes:
      change: an override of the trained model; "" for none.
      model: what was trained.
      search: fields of a `Search`, of a reader that searches.
      asked: the prompt ends with the question, which comes after it otherwise.
    """

    change: str = ""
    model: str = "attention"
    search: str = ""
    asked: bool = False


READERS = {
    "full": Reader(),
    "window": Reader(f"model...cache=RecentTokens(budget={BUDGET})"),
    "streaming_llm": Reader(f"model...cache=StreamingLLM(budget={BUDGET})"),
    "heavy_hitters": Reader(f"model...cache=HeavyHitters(budget={BUDGET})"),
    "snap_kv": Reader(f"model...cache=SnapKV(budget={BUDGET})", asked=True),
    "long_heads": Reader(f"model...cache=LongHeads(chunk=16,top={BUDGET // 16})"),
    "hip": Reader(f"model...cache=HiP(block=2,top={BUDGET - 32},window=32)"),
    "landmark": Reader("model...retrieve=4", "landmark"),
    "infini_retri": Reader(search=f"window={BUDGET // 2},top=16,budget={BUDGET // 4},question=2"),
}
"""By name. SnapKV chooses by what the end of the prompt looks at, so that its prompt ends with the question, as
published: the first digit of the answer is then read from the whole context."""


def attention() -> Experiment:
    """Softmax attention without positions learns the passkey at up to 256 tokens (experiments/lengths.py).

    python main.py train lengths.attention
    """
    return _passkey("lengths.attention", 3, Attention(heads=2))


def landmark() -> Experiment:
    """The same with Landmark attention, behind a convolution as wide as a block; 1,000 steps do not teach it.

    python main.py train lengths.landmark
    """
    return _passkey("lengths.landmark", 9, Landmark(heads=2, block=8))


def _passkey(name: str, kernel: int, mixer: MixerConfig) -> Experiment:
    stages = repeat(BaseConvolution(kernel=kernel), mixer, depth=2)
    model = LanguageModel(width=64, stages=stages, norm=LayerNorm(), mlp=None)
    mixture = (Slice(length=32, weight=3.0), Slice(length=TRAINED))
    evaluated: dict[str, Any] = {"evaluation": (Slice(length=TRAINED),), "evaluation_examples": 128}
    data = ruler("passkey", length=TRAINED, mixture=mixture, **evaluated)
    optimizer = AdamW(learning_rate=5e-3, weight_decay=0.1, decay_everything=True)
    run = Run(steps=1000, batch_size=32, steps_per_call=25, evaluate_every=250, checkpoint_every=500)
    return Experiment(name=name, model=model, data=data, optimizer=optimizer, run=run)


def measure(run: SavedRun, reader: Reader, length: int, examples: int) -> Row:
    """Returns what `evaluate_streamed` does of a reader at a length: accuracy is that of the answer's digits."""
    experiment = apply_overrides(run.experiment, [reader.change] if reader.change else [])
    data = _at(experiment.data, length, examples)
    batch_size = min(examples, max(1, TOKENS_AT_ONCE // length))
    experiment = chz.replace(experiment, data=data, run=chz.replace(experiment.run, batch_size=batch_size))
    context, start = length - data.key_tokens - data.value_tokens, time.perf_counter()
    if reader.search:
        search = apply_overrides(Search(), reader.search.split(","))
        metrics = evaluate_searched(experiment, run.params, context, search)
    else:
        metrics = evaluate_streamed(experiment, run.params, context + (1 + data.key_tokens) * reader.asked)
    return {
        "accuracy": metrics["accuracy"],
        "exact": metrics["exact"],
        "accuracy_by_depth": metrics["accuracy_by_depth"][str(length)],
        "state_bytes": metrics["state_bytes"][str(length)],
        "keys_read": metrics["keys_read"],
        "mass_kept": metrics.get("mass_kept"),
        "seconds": time.perf_counter() - start,
    }


def _at(data: Any, length: int, examples: int) -> Any:
    """Returns the task at one length; raises UserError where that is too short."""
    return chz.replace(data, length=length, mixture=(), evaluation=(), extrapolation=(), evaluation_examples=examples)


def expected(rows: Sequence[Row]) -> Iterator[tuple[bool, str]]:
    """Yields whether what is expected holds, and that as a line of text: windows score as a guess where the needle is
    out of their reach, and what retrieves stays within 0.1 of reading everything."""
    scores = {(row["reader"], row["length"]): row for row in rows}
    for (reader, length), row in scores.items():
        full = scores.get(("full", length))
        if reader in ("window", "streaming_llm"):
            # The last tenth of the context that lies before everything that is kept, with its needles.
            reach = (length - BUDGET) / length * 10 - 1
            far = [share for depth, share in row["accuracy_by_depth"].items() if int(depth[:-1]) / 10 < reach]
            if far:
                most = max(far)
                yield most <= 0.25, f"{reader} at {length}: out of reach at most {most:.3f}, a guess scores 0.1"
        elif reader in ("landmark", "hip") and full is not None:
            score, best = row["accuracy"], full["accuracy"]
            yield score >= best - 0.1, f"{reader} at {length}: {score:.3f}, full attention {best:.3f}"
        elif reader == "full":
            yield row["accuracy"] >= 0.9, f"full at {length}: {row['accuracy']:.3f}, at least 0.9 is expected"


def study(out: Path, lengths: Sequence[int], only: Sequence[str], examples: int, steps: int | None = None) -> list[Row]:
    """Trains the models that `out` lacks, measures, and writes rows and figure; returns the rows asked for.

    Raises:
      UserError: a length is too short for the task, or a file cannot be written.
    """
    names = only or list(READERS)
    for length in lengths:
        _at(attention().data, length, examples)
    runs = {}
    for experiment in (attention(), landmark()):
        model = experiment.name.partition(".")[2]
        if any(READERS[name].model == model for name in names):
            run = chz.replace(experiment.run, directory=str(out / model), **({"steps": steps} if steps else {}))
            train(chz.replace(experiment, run=run))
            runs[model] = open_run(out / model)
    measurements, rows = Measurements(out / "lengths.json"), []
    for length, name in itertools.product(lengths, names):
        reader = READERS[name]
        saved = runs[reader.model]
        count = max(1, min(examples, TOKENS // length))
        what = {"reader": name, "length": length, "examples": count, "steps": saved.step}
        measured = functools.partial(measure, saved, reader, length, count)
        row = measurements.of(what | dataclasses.asdict(reader), measured)
        cost = f"{row['state_bytes']:,} bytes, {row['keys_read']:,.1f} keys per token, in {row['seconds']:.0f} s"
        print(f"{name} at {length}: {row['accuracy']:.3f} of the digits, {cost}", flush=True)
        rows.append(row)
    write_rows(out / "lengths.csv", rows)
    accuracy_by_depth(rows, out / "lengths.png")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit code."""
    parser = argparse.ArgumentParser(prog="lengths", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--lengths", type=_lengths, default=LENGTHS, metavar="N,N", help="of contexts (16384 takes long)"
    )
    parser.add_argument("--only", action="append", default=[], choices=list(READERS), metavar="READER")
    parser.add_argument("--examples", type=int, default=64, help="at each length, or as many as have 131,072 tokens")
    parser.add_argument("--steps", type=int, help="of training, where it is not there")
    options = parser.parse_args(arguments)
    rows = study(options.out, options.lengths, options.only, options.examples, options.steps)
    for holds, line in expected(rows):
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {line}")
    print(f"table: {options.out / 'lengths.csv'}, lengths.json; figure: {options.out / 'lengths.png'}")
    return 0


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(exit_code(main))
