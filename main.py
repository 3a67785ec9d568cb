"""The command line of Recollect. Heavy imports happen inside commands, so that `list` and errors answer at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from recollect.configuration.base import Preempted, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (2 for a user's mistake, 130 for a stopped run)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        options.overrides = rest
    elif rest and (any(argument.startswith("-") for argument in rest) or not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:
        options.overrides += rest  # argparse gives up on trailing positionals that an option separates
    try:
        return COMMANDS[options.command](options)
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
        help="compile ahead of time for this slice or GPU (needs libtpu or XLA's CUDA plugin): memory, collectives, "
        "traffic and times per device",
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
    replay = command("replay", "run a step again that was not finite, and name the layer that broke first")
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
    prepare.add_argument("--processes", type=int, metavar="N", help="how many work at once (default: one per core)")
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


def _list(options: argparse.Namespace) -> int:
    from recollect.experiments.registry import entries

    for kind, title in (("experiment", "Experiments (train, describe):"), ("study", "Studies (compare):")):
        print(title)
        for entry in entries().values():
            if entry.kind == kind:
                print(f"  {entry.name:32} {entry.summary}")
    return 0


def _describe(options: argparse.Namespace) -> int:
    if options.target is not None:
        # Read when jax is imported: libtpu would otherwise ask a metadata server that only Google's machines have.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    experiment = _experiment(options)
    from recollect.cost.describe import describe

    describe(experiment, target=options.target, say=print)
    return 0


def _train(options: argparse.Namespace) -> int:
    experiment = _experiment(options)
    from recollect.training.distributed.host import joined
    from recollect.training.train import run_directory, train

    with joined(options.coordinator, options.processes, options.process) as host:
        result = train(experiment)
        if host.is_main:
            shown = {name: result[name] for name in SHOWN if name in result}
            texts = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in shown.items()}
            print(", ".join(f"{name} {text}" for name, text in texts.items()))
            print(f"result: {run_directory(experiment) / 'result.json'}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from recollect.experiments.registry import load

    files = _files(options)
    study = load(options.study, "study")
    from recollect.experiments.compare import compare

    compare(
        study,
        options.study,
        options.out or Path("runs") / options.study,
        files=files,
        only=options.only,
        overrides=options.overrides,
        together=options.together,
        on=options.on,
        cpus=options.cpus_per_task,
        gpus=options.gpus_per_task,
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    import json

    from recollect.training.checkpoint.load import evaluate_run

    _definitions(options)
    print(json.dumps(evaluate_run(options.run, options.overrides), indent=2))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from recollect.training.checkpoint.load import continue_prompt

    _definitions(options)
    sampling = options.length, options.temperature, options.top_p, options.seed
    print(continue_prompt(options.run, options.overrides, options.prompt, *sampling))
    return 0


def _export(options: argparse.Namespace) -> int:
    from recollect.export.safetensors_format import export_safetensors
    from recollect.training.checkpoint.load import open_run

    _definitions(options)
    run = open_run(options.run)
    export_safetensors(run.params, run.experiment, options.out, extra={"step": run.step})
    print(f"exported: {options.out / 'model.safetensors'}, {options.out / 'config.json'}")
    return 0


def _replay(options: argparse.Namespace) -> int:
    from recollect.training.recovery.replay import replay

    _definitions(options)
    return 0 if replay(options.failure) else 1


def _prepare(options: argparse.Namespace) -> int:
    from recollect.data.text.preparation.prepare import run

    shard_bytes = None if options.shard_mib is None else int(options.shard_mib * 2**20)
    source = options.source, options.out, options.tokenizer
    return run(*source, options.processes, options.field, options.start, shard_bytes)


def _bench(options: argparse.Namespace) -> int:
    name, *arguments = options.overrides or [None]
    if name not in BENCHMARKS:
        what = "nothing" if name is None else repr(name)
        raise UserError(
            f"bench {what}: there are {', '.join(BENCHMARKS)}; `bench NAME --help` lists a benchmark's options"
        )
    return importlib.import_module(f"recollect.benchmarks.{BENCHMARKS[name]}").main(arguments)


def _definitions(options: argparse.Namespace) -> list[ModuleType]:
    """Imports the config classes that a saved run may name: the project's, and those of `--with` files."""
    for module in ("training.experiment", "data.synthetics", "data.text.dataset"):
        importlib.import_module(f"recollect.{module}")
    return _files(options)


def _files(options: argparse.Namespace) -> list[ModuleType]:
    """Runs the `--with` files."""
    from recollect.configuration.python_files import load_definitions

    return [load_definitions(Path(path)) for path in options.extra]


def _experiment(options: argparse.Namespace):
    """Returns the experiment that was named, with its overrides."""
    from recollect.configuration import apply_overrides
    from recollect.experiments.registry import load

    _files(options)
    return apply_overrides(load(options.experiment, "experiment"), options.overrides)


SHOWN = (
    *("accuracy", "bits_per_byte", "loss", "status", "steps", "seconds", "examples_per_second", "tokens_per_second"),
    *("mfu", "waiting_for_data"),
)
"""Entries of result.json that `train` prints."""

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
    "cold-start": "cold_start",
    "decomposition": "decomposition",
    "pretraining": "pretraining",
    "recurrences": "recurrences",
}

if __name__ == "__main__":
    sys.exit(main())
