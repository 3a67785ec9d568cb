"""`--sweep path=v1,v2,...`: axes of a sweep from the command line, beside the points that a study has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from chz.blueprint import Castable

from recollect.configuration import UserError, apply_overrides, get_field
from recollect.configuration.overrides import matches
from recollect.training.experiment import Experiment

Point = dict[str, Any]

NOT_SWEPT = {
    "name": "names a run; --out DIR names the folder of all",
    "run.directory": "is where a run is kept; --out DIR names the folder of all",
}
"""Fields that are not the same in, or swept over, several runs: why."""


def swept(
    points: Sequence[Point], sweeps: Sequence[str], overrides: Sequence[str], experiment: Experiment
) -> tuple[Point, ...]:
    """Returns a study's points without the axes that `sweeps` or `overrides` set anew, at every combination of the
    values of `sweeps`, the last axis fastest.

    Args:
      sweeps: texts "path=v1,v2,...".
      overrides: texts "path=value".
      experiment: one of those that are swept, with its overrides: what the values are for.

    Raises:
      UserError: a text is none of this form, a value is given twice or its field refuses it, or a field is no axis.
    """
    axes: dict[str, list[Any]] = {}
    for text in sweeps:
        path, equals, values = text.partition("=")
        if not equals or not path or not values:
            form = "the form is path=v1,v2,..., for example optimizer.learning_rate=1e-3,3e-3"
            raise UserError(f"--sweep {text}: {form}")
        if path in NOT_SWEPT:
            raise UserError(f"--sweep {text}: {path} {NOT_SWEPT[path]}")
        if any(matches(path, other) or matches(other, path) for other in axes):
            raise UserError(f"--sweep {text}: {path} is swept twice; give all its values in one --sweep")
        axes[path] = _values(experiment, path, split(values), text)
    set_anew = [*axes, *(override.partition("=")[0] for override in overrides)]
    left = [
        {path: value for path, value in point.items() if not any(matches(pattern, path) for pattern in set_anew)}
        for point in points
    ]
    unique = [point for index, point in enumerate(left) if point not in left[:index]]
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return tuple({**point, **added} for point in unique for added in grid)


def split(text: str) -> list[str]:
    """Returns the parts of a text between its commas that are outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _values(experiment: Experiment, path: str, texts: list[str], said: str) -> list[Any]:
    """Returns the values as the field holds them, those of classes and of several fields as texts."""
    values: list[Any] = []
    for text in texts:
        if not text:
            raise UserError(f"--sweep {said}: a value is missing between two commas")
        made = apply_overrides(experiment, [f"{path}={text}"])
        value = Castable(text) if "..." in path else get_field(made, path)
        values.append(value if value is None or isinstance(value, (bool, int, float, str)) else Castable(text))
    if repeated := [text for index, text in enumerate(texts) if values[index] in values[:index]]:
        raise UserError(f"--sweep {said}: {repeated[0]} is there twice")
    return values


def study_name(experiment: Experiment, sweeps: Sequence[str]) -> str:
    """Returns a name for the study of one experiment over axes: mqar.attention,learning_rate,seed."""
    fields = [text.partition("=")[0].rpartition(".")[2] for text in sweeps]
    return ",".join([experiment.name, *fields])
