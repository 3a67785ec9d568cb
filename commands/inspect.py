"""Shows what is in a data set: splits, lengths, unknown tokens, first documents; examples of a recall task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recollect.commands import add_overrides, add_with, experiment_of
from recollect.starting import PROGRAM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    what = "a prepared folder, text, token ids or stdlib; a run's folder; an experiment; or a task's class (MQAR)"
    parser.add_argument("experiment", metavar="what", help=what)
    parser.add_argument("--count", type=int, default=2, metavar="N", help="documents or examples of each (default: 2)")
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.configuration import UserError
    from recollect.data.inspection import inspect_data

    if options.count < 0:
        raise UserError(f"--count {options.count}: must not be negative")
    for line in inspect_data(_data_of(options), options.count):
        print(line)
    return 0


def _data_of(options: argparse.Namespace) -> Any:
    """Returns the data set that was named, with its overrides: `data.length=64`, or `length=64`."""
    from inspect import isabstract

    from recollect.commands.user_code import load_files
    from recollect.configuration import UserError, apply_overrides, known_configs
    from recollect.configuration.names import nearest
    from recollect.configuration.read_json import read_json
    from recollect.configuration.user_paths import path, path_kind
    from recollect.data.batch import DataConfig
    from recollect.data.text.dataset import Text
    from recollect.experiments.registry import entries
    from recollect.experiments.user_file import is_file
    from recollect.training.saved_experiment import experiment_from_json

    name, place = options.experiment, path(options.experiment)
    if name in entries() or is_file(name):
        return experiment_of(options).data
    is_there = path_kind(place, name) is not None
    is_run = is_there and (place / "config.json").is_file() and (place / "checkpoints").exists()
    load_files(options, place if is_run else None)
    kinds = ((key, kind) for key, kind in known_configs().items() if issubclass(kind, DataConfig))
    tasks = {key: kind for key, kind in kinds if not isabstract(kind)}
    if is_run:
        data: Any = experiment_from_json(read_json(place / "config.json"), name).data
    elif is_there and _holds_runs(place):
        raise UserError(f"{name} holds runs, not data; `{PROGRAM} report {name}` shows them")
    elif is_there or name == "stdlib" or name.startswith("tfds:"):
        data = Text(source=name)
    elif name in tasks:
        data = tasks[name]()
    else:
        close = nearest(name, [*tasks, *(key for key, entry in entries().items() if entry.kind == "experiment")])
        raise UserError(f"{name} is no file or folder, experiment or task{close}; `{PROGRAM} list` shows experiments")
    return apply_overrides(data, [argument.removeprefix("data.") for argument in options.overrides])


def _holds_runs(folder: Path) -> bool:
    """Returns whether a folder is a run's, or that of several, in which no data is."""
    at = ("", "*/", "*/*/")
    return any(next(folder.glob(f"{start}{name}"), None) for start in at for name in ("metrics.jsonl", "result.json"))
