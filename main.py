"""The command line of Recollect. Heavy imports happen inside commands, so that `list` and errors answer at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from recollect.configuration.base import Preempted, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (2 for a user's mistake, 130 for a stopped run)."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    if given.command == "bench":
        given.overrides = rest
    elif rest and (any(argument.startswith("-") for argument in rest) or not hasattr(given, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:
        given.overrides += rest  # argparse gives up on trailing positionals that an option separates
    try:
        return COMMANDS[given.command](given)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Preempted as preempted:
        print(f"{preempted}; the same command goes on from the last checkpoint", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    """argparse with this project's error line."""

    def error(self, message: str):
        print(f"error: {message} (see `python main.py --help`)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py", description="Efficient attention architectures: recall, state size, speed, pretraining, export."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="command")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        if name != "list":
            added.add_argument(
                "--with",
                dest="extra",
                action="append",
                default=[],
                metavar="FILE.py",
                help="a file of yours that defines mixers (it is run)",
            )
        return added

    command("list", "names of all experiments and studies")
    describe = command("describe", "parameters, FLOPs, state bytes and a compile check, without data")
    describe.add_argument("experiment")
    describe.add_argument(
        "--target",
        metavar="tpu:v5e:2x2|h100",
        help="compile ahead of time for this slice or GPU (needs libtpu or XLA's CUDA plugin): memory, collectives, traffic and times of a device",
    )
    train = command("train", "train one experiment; the same command resumes it")
    train.add_argument("experiment")
    train.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0, when several processes train together (docs/clusters.md)",
    )
    train.add_argument("--processes", type=int, metavar="N", help="how many processes train together")
    train.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    compare = command("compare", "train what a study lacks, then table and plots")
    compare.add_argument("study")
    compare.add_argument("--out", type=Path, metavar="DIR", help="where runs, table and plots go (default: runs/STUDY)")
    compare.add_argument(
        "--together",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train members that differ in values only at once (default: on accelerators)",
    )
    compare.add_argument(
        "--on",
        metavar="ray[:ADDRESS]",
        help="train on a Ray cluster: the one at ADDRESS, else one started here (docs/clusters.md)",
    )
    compare.add_argument(
        "--cpus-per-task", type=float, metavar="N", help="with --on ray (default: CPUs shared out among the tasks)"
    )
    compare.add_argument(
        "--gpus-per-task", type=float, metavar="N", help="with --on ray (default: 1 where the cluster has GPUs)"
    )
    compare.add_argument(
        "--only", action="append", default=[], metavar="EXPERIMENT", help="only these experiments of the study"
    )
    evaluate = command("evaluate", "evaluate a run's newest checkpoint")
    evaluate.add_argument("run", type=Path)
    generate = command("generate", "continue a prompt with a text model")
    generate.add_argument("run", type=Path)
    generate.add_argument("--prompt", default="def ")
    generate.add_argument("--length", type=int, default=200, help="tokens to generate")
    generate.add_argument("--temperature", type=float, default=0.8)
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)
    replay = command("replay", "run a step again that was not finite, and tell which layer broke first")
    replay.add_argument("failure", type=Path, metavar="DIR", help="the folder that the stopped run names")
    export = command("export", "write a run's newest checkpoint as safetensors + config.json")
    export.add_argument("run", type=Path)
    export.add_argument("out", type=Path)
    prepare = command("prepare", "tokenise a text source once, into a folder that training reads")
    prepare.add_argument("source", help="stdlib, a text, .jsonl(.gz) or .parquet file, a folder of them, or tfds:NAME")
    prepare.add_argument("out", type=Path, help="a new folder, or one that the same command left unfinished")
    prepare.add_argument(
        "--tokenizer", default="bytes", metavar="NAME", help="bytes, bpe:SIZE (trained here) or a tokenizer.json"
    )
    prepare.add_argument(
        "--start", metavar="TOKEN", help="the token of a tokenizer.json that opens documents, if it has an unusual name"
    )
    prepare.add_argument(
        "--field", default="text", metavar="NAME", help="key, column or feature that holds the text (default: text)"
    )
    prepare.add_argument("--processes", type=int, metavar="N", help="how many work at once (default: one a core)")
    prepare.add_argument(
        "--shard-mib", type=float, metavar="N", help="text of a shard (default: 4, more from 2 GiB on)"
    )
    # Its options are the benchmark's own: `bench kernels --help`.
    commands.add_parser("bench", help="time this project's parts, beside peers where they can be had", add_help=False)
    for added in (describe, train, compare, evaluate, generate):
        added.add_argument(
            "overrides", nargs="*", metavar="path=value", help="for example optimizer.learning_rate=3e-4"
        )
    return parser


def _list(given: argparse.Namespace) -> int:
    from recollect.experiments.registry import entries

    for kind, title in (("experiment", "Experiments (train, describe):"), ("study", "Studies (compare):")):
        print(title)
        for entry in entries().values():
            if entry.kind == kind:
                print(f"  {entry.name:32} {entry.summary}")
    return 0


def _load(given: argparse.Namespace, kind: str, name: str):
    from recollect.configuration.python_files import load_definitions
    from recollect.experiments.registry import load

    definitions = [load_definitions(Path(path)) for path in given.extra]
    return load(name, kind), definitions


def _describe(given: argparse.Namespace) -> int:
    if given.target is not None:
        # Read when jax is imported: libtpu would otherwise ask a metadata server that only Google's machines have.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from recollect.configuration import apply_overrides
    from recollect.cost.describe import describe

    experiment, _ = _load(given, "experiment", given.experiment)
    describe(apply_overrides(experiment, given.overrides), target=given.target, say=print)
    return 0


def _train(given: argparse.Namespace) -> int:
    from recollect.configuration import apply_overrides
    from recollect.training.distributed.processes import is_main, joined
    from recollect.training.train import run_directory, train

    experiment, _ = _load(given, "experiment", given.experiment)
    experiment = apply_overrides(experiment, given.overrides)
    with joined(given.coordinator, given.processes, given.process):
        result = train(experiment)
        shown = {
            name: result[name]
            for name in (
                "accuracy",
                "bits_per_byte",
                "loss",
                "status",
                "steps",
                "seconds",
                "examples_per_second",
                "tokens_per_second",
                "mfu",
                "waiting_for_data",
            )
            if name in result
        }
        if is_main():
            print(
                ", ".join(
                    f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in shown.items()
                )
            )
            print(f"result: {run_directory(experiment) / 'result.json'}")
    return 0


def _compare(given: argparse.Namespace) -> int:
    from recollect.configuration import apply_overrides
    from recollect.evaluation.plots import accuracy_by_slice, learning_curves, recall_vs_state
    from recollect.evaluation.results import load_runs
    from recollect.evaluation.summaries import summarise
    from recollect.evaluation.table import format_table, write_csv
    from recollect.experiments.study import add_mixers
    from recollect.training.sweeps.study import run_study

    study, definitions = _load(given, "study", given.study)
    experiments = list(study.experiments) + add_mixers(study, given.study, definitions)
    if given.only:
        names = [experiment.name for experiment in experiments]
        for name in given.only:
            if name not in names:
                raise UserError(f"{given.study} has no experiment {name!r}; it has {', '.join(names)}")
        experiments = [experiment for experiment in experiments if experiment.name in given.only]
    experiments = [apply_overrides(experiment, given.overrides) for experiment in experiments]
    out = given.out or Path("runs") / given.study
    failures: list[str] = []
    if given.on is None:
        folders = run_study(experiments, study.sweep, out, together=given.together)
    else:
        folders, failures = _on_ray(given, experiments, study.sweep, out)
    if failures and not folders:
        raise UserError(f"no run of {given.study} finished; {failures[0]}")
    runs = load_runs(folders)
    summaries = summarise(runs)
    print(format_table(summaries))
    write_csv(out / "results.csv", runs)
    recall = [summary for summary in summaries if summary.metric == "accuracy"]
    # Accuracy and bits a byte share no axis: a study that mixes them is drawn for recall.
    accuracy_by_slice(recall or summaries, out / "accuracy_by_slice.png")
    learning_curves([run for run in runs if not recall or run.metric == "accuracy"], out / "learning_curves.png")
    print(f"table: {out / 'results.csv'}; plots: {out / 'accuracy_by_slice.png'}, {out / 'learning_curves.png'}")
    if recall:
        recall_vs_state(recall, out / "recall_vs_state.png")
        print(f"recall against state size: {out / 'recall_vs_state.png'}")
    if failures:
        raise UserError(
            f"{len(failures)} of the study's tasks failed ({'; '.join(failures)}); the table and plots are without them"
        )
    return 0


def _on_ray(given: argparse.Namespace, experiments: list, sweep: tuple, out: Path) -> tuple[list[Path], list[str]]:
    """The folders of runs that are done, and what failed."""
    from recollect.training.sweeps.ray_sweep import run_study_on_ray

    system, _, address = given.on.partition(":")
    if system != "ray":
        raise UserError(f"--on {given.on}: there is ray, or ray:ADDRESS of a running cluster")
    for name in ("cpus_per_task", "gpus_per_task"):
        if getattr(given, name) is not None and getattr(given, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(given, name):g}: must not be negative")
    swept = run_study_on_ray(
        experiments,
        sweep,
        out,
        address=address or None,
        together=given.together,
        cpus=given.cpus_per_task,
        gpus=given.gpus_per_task,
        definitions=[Path(path) for path in given.extra],
    )
    return swept.folders, swept.failures


def _evaluate(given: argparse.Namespace) -> int:
    from recollect.training.checkpoint.load import evaluate_run

    _definitions(given)
    found = evaluate_run(given.run, given.overrides)
    import json

    print(json.dumps(found, indent=2))
    return 0


def _generate(given: argparse.Namespace) -> int:
    from recollect.training.checkpoint.load import continue_prompt

    _definitions(given)
    print(
        continue_prompt(
            given.run, given.overrides, given.prompt, given.length, given.temperature, given.top_p, given.seed
        )
    )
    return 0


def _export(given: argparse.Namespace) -> int:
    from recollect.export.safetensors_format import export_safetensors
    from recollect.training.checkpoint.load import open_run

    _definitions(given)
    run = open_run(given.run)
    export_safetensors(run.params, run.experiment, given.out, extra={"step": run.step})
    print(f"exported: {given.out / 'model.safetensors'}, {given.out / 'config.json'}")
    return 0


def _replay(given: argparse.Namespace) -> int:
    from recollect.training.recovery.replay import replay

    _definitions(given)
    return 0 if replay(given.failure) else 1


def _prepare(given: argparse.Namespace) -> int:
    from recollect.data.text.preparation.prepare import run

    shard_bytes = None if given.shard_mib is None else int(given.shard_mib * 2**20)
    return run(given.source, given.out, given.tokenizer, given.processes, given.field, given.start, shard_bytes)


def _bench(given: argparse.Namespace) -> int:
    if not given.overrides or given.overrides[0] not in BENCHMARKS:
        what = repr(given.overrides[0]) if given.overrides else "nothing"
        raise UserError(
            f"bench {what}: there are {', '.join(BENCHMARKS)}; `bench NAME --help` lists a benchmark's options"
        )
    import importlib

    return importlib.import_module(f"recollect.benchmarks.{BENCHMARKS[given.overrides[0]]}").main(given.overrides[1:])


def _definitions(given: argparse.Namespace) -> None:
    """Config classes that a saved run may name: the project's, and those of `--with` files."""
    import recollect.training.experiment  # noqa: F401
    from recollect.configuration.python_files import load_definitions
    from recollect.data import synthetics  # noqa: F401
    from recollect.data.text import dataset  # noqa: F401

    for path in given.extra:
        load_definitions(Path(path))


COMMANDS = {
    "list": _list,
    "describe": _describe,
    "train": _train,
    "compare": _compare,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
    "replay": _replay,
    "prepare": _prepare,
    "bench": _bench,
}
BENCHMARKS = {
    "kernels": "kernels",
    "device": "device",
    "head-mixture": "head_mixture",
    "recall": "recall_training",
    "decomposition": "decomposition",
    "pretraining": "pretraining",
    "recurrences": "recurrences",
}

if __name__ == "__main__":
    sys.exit(main())
