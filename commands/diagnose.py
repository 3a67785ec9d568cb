"""Looks into a run's newest checkpoint, and says what usually helps where it is stuck."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recollect.commands import add_overrides, add_with
from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument("run", type=path, help="a run's folder")
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.commands.user_code import load_files
    from recollect.training.diagnosis import advise, lines_of, look_into

    load_files(options, options.run)
    seen = look_into(options.run, options.overrides)
    for line in lines_of(seen, advise(options.run, seen, _words(options.run, seen.experiment))):
        print(line)
    return 0


def _words(run: Path, experiment: Any) -> list[str]:
    """Returns the words that train a run's experiment anew: those that trained it where they are known; else its name
    and the fields in which it differs from the experiment of that name (of a study's member), where there is one."""
    from recollect.configuration import UserError, to_json
    from recollect.configuration.io import flatten
    from recollect.configuration.read_json import read_json_object
    from recollect.experiments.registry import load

    environment = run / "environment.json"
    command = read_json_object(environment).get("command") or [] if environment.exists() else []
    if command[1:2] == ["train"]:
        return command[1:]
    try:
        named = flatten(to_json(load(experiment.name, "experiment")))
    except UserError:
        return ["train", experiment.name]
    fields = flatten(to_json(experiment))
    differing = [name for name, value in fields.items() if name != "run.directory" and value != named.get(name)]
    return ["train", experiment.name, *(f"{name}={fields[name]}" for name in differing)]
