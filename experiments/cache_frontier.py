"""What is recalled against the bytes held and the keys read: cache policies on one trained model of softmax attention,
beside mixers that were trained on the same task.

    python -m recollect.experiments.cache_frontier runs/mqar.attention runs/mqar.fixed --out runs/frontier --prefill 16

The run comes first, then folders with runs of other mixers, such as a study's; of those of one name the one that scores
best is taken. Each is evaluated token by token. Writes frontier.json, frontier.csv and frontier.png; what
frontier.json holds is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import chz

from recollect.configuration import UserError, apply_overrides, to_json
from recollect.configuration.console import exit_code
from recollect.evaluation.plots import accuracy_by_cost
from recollect.evaluation.results import RunResult, find_runs, load_runs
from recollect.experiments.measurements import Measurements, Row, write_rows
from recollect.layers import Attention
from recollect.training.checkpoint.load import SavedRun, open_run
from recollect.training.streamed_evaluation import evaluate_streamed

POLICIES = (
    *(f"{name}(budget={budget})" for name in ("RecentTokens", "HeavyHitters") for budget in (8, 16, 24, 32, 48)),
    *(f"StreamingLLM(budget={budget},sinks=2)" for budget in (8, 16, 24, 32, 48)),
    *(f"SnapKV(budget={budget},window=4,recent={2 * budget})" for budget in (6, 8, 12, 16)),
    *(f"Quantised(bits={bits},window=8)" for bits in (4, 8)),
    *(f"Recycled(top={top},every={every})" for top in (8, 16, 24) for every in (2, 8)),
    *(f"HiP(block=2,top={top},sinks=0,window=8,every={every})" for top in (4, 8, 16) for every in (1, 4)),
    *(f"LongHeads(chunk=4,top={top})" for top in (4, 6, 8)),
)
"""For contexts of some 64 tokens."""


def measure(run: SavedRun, cache: str | None, prefill: int, examples: int) -> Row:
    """Returns what `evaluate_streamed` does of a run with a cache policy: its score, and bytes at the last length."""
    experiment = apply_overrides(run.experiment, [] if cache is None else [f"model...cache={cache}"])
    data = chz.replace(experiment.data, evaluation_examples=examples)
    metrics = evaluate_streamed(chz.replace(experiment, data=data), run.params, prefill)
    measured = {name: metrics.get(name) for name in ("keys_read", "mass_kept")}
    return {"accuracy": metrics[metrics["metric"]], "state_bytes": max(metrics["state_bytes"].values()), **measured}


def best_runs(folders: Sequence[str]) -> dict[str, RunResult]:
    """Returns of the finished runs in some folders, by name, the one that scores best."""
    best: dict[str, RunResult] = {}
    for run in load_runs(find_runs(folders)) if folders else ():
        if run.name not in best or run.score > best[run.name].score:
            best[run.name] = run
    return best


def study(
    run: Path, folders: Sequence[str], out: Path, prefill: int, examples: int, policies: Sequence[str] = POLICIES
) -> list[Row]:
    """Measures what `out` lacks, and writes rows and figure; returns the rows.

    Raises:
      UserError: the run is none of softmax attention, a run of the folders has another task, or a file cannot be
        written.
    """
    trained = open_run(run)
    if not any(isinstance(mixer, Attention) for mixer in trained.experiment.model.mixers):
        raise UserError(f"{run}: has no layer of Attention, whose cache could be another")
    task = to_json(chz.replace(trained.experiment.data, evaluation_examples=examples))
    measurements, rows = Measurements(out / "frontier.json"), []

    def add(saved: SavedRun, folder: Path, name: str, mixer: str, cache: str | None) -> None:
        what = {"run": str(folder), "step": saved.step, "name": name, "mixer": mixer, "setting": cache}
        measured = functools.partial(measure, saved, cache, prefill, examples)
        row = measurements.of(what | {"prefill": prefill, "examples": examples}, measured)
        rows.append(row)
        cost = f"{row['state_bytes']:,} bytes, {row['keys_read']:,.1f} keys per token"
        print(f"{cache or name}: {row['accuracy']:.3f}, {cost}", flush=True)

    for cache in policies:
        policy = cache.partition("(")[0]
        add(trained, run, policy, policy, cache)
    for name, result in best_runs([str(run), *folders]).items():
        other = open_run(result.folder)
        if to_json(chz.replace(other.experiment.data, evaluation_examples=examples)) != task:
            raise UserError(f"{result.folder}: its task differs from that of {run}")
        if all(mixer.traits.streams for mixer in other.experiment.model.mixers):
            add(other, result.folder, name.rpartition(".")[2], result.mixer, None)
        else:
            print(f"{name}: does not stream, and is left out")
    write_rows(out / "frontier.csv", rows)
    accuracy_by_cost(rows, out / "frontier.png")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="cache_frontier", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="of softmax attention")
    parser.add_argument("folders", nargs="*", help="with runs of other mixers on its task")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prefill", type=int, default=0, metavar="N", help="first tokens that come at once")
    parser.add_argument("--examples", type=int, default=128, metavar="N")
    options = parser.parse_args(arguments)
    study(options.run, options.folders, options.out, options.prefill, options.examples)
    print(f"table: {options.out / 'frontier.csv'}, frontier.json; figure: {options.out / 'frontier.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
