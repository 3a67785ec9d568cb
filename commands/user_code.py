"""What commands do with files of the user's: `--with FILE.py`, `FILE.py:NAME`, and code that a run was trained with."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

from recollect.configuration.machine import expanded
from recollect.configuration.python_files import file_of, forget, load_definitions


def load_files(options: argparse.Namespace, run: Path | None = None) -> list[ModuleType]:
    """Runs the `--with` files and returns their modules; without any, runs what `run` was trained with."""
    forget()
    if run is not None and not options.extra:
        from recollect.training.checkpoint.named_run import run_at
        from recollect.training.user_code import run_recorded

        run_recorded(run_at(run)[0])
    return [load_definitions(expanded(path, f"--with {path}")) for path in options.extra]


def load_named(name: str, kind: str) -> Any:
    """Returns the experiment or study (`kind`) of this name, of the project or of a file of the user's."""
    from recollect.experiments.user_file import is_file, load_from_file

    if is_file(name):
        return load_from_file(name, kind)
    from recollect.experiments.registry import load

    return load(name, kind)


def load_mixers(reference: str) -> dict[str, Any]:
    """Returns the mixer configs of FILE.py by name, or the one of FILE.py:NAME."""
    from recollect.configuration import UserError
    from recollect.experiments.study import mixers_of
    from recollect.experiments.user_file import is_file, split

    if not is_file(reference):
        raise UserError(f"{reference}: a file of yours is needed, FILE.py or FILE.py:MIXER")
    forget()
    path, name = split(reference)
    return mixers_of(load_definitions(path), name)


def user_experiment(options: argparse.Namespace) -> Any:
    """Returns the experiment that was named, with its overrides, where files of the user's have a part in it, or had in
    an earlier command of this process."""
    from recollect.configuration import apply_overrides

    load_files(options)
    experiment = apply_overrides(load_named(options.experiment, "experiment"), options.overrides, print)
    check_mixers(experiment)
    return experiment


def check_mixers(experiment: Any) -> None:
    """Raises UserError, with file and line, where a mixer of the user's returns what the model cannot use."""
    from recollect.layers.mixer_outputs import check_outputs

    for mixer in dict.fromkeys(mixer for stage in experiment.model.stages for mixer in stage.pattern):
        if file_of(type(mixer)) is not None:
            check_outputs(mixer, experiment.model.width)
