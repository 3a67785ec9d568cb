"""Studies: several experiments and the values to try on each."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from recollect.configuration import UserError
from recollect.experiments.orderings import Ordering
from recollect.layers.mixer import MixerConfig
from recollect.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Study:
    """Holds what `main.py compare` runs: every experiment at every point of the sweep.

    Attributes:
      experiments: one per architecture; names are labels in tables and plots.
      sweep: points, each a dict of dotted overrides.
      template: (label, mixer) -> experiment, or experiments on several tasks, for mixers that a user adds with
        `--with`; None if the study takes none.
      expects: orderings that it should show, checked after its table.
    """

    experiments: tuple[Experiment, ...]
    sweep: tuple[dict[str, Any], ...] = ({},)
    template: Callable[[str, MixerConfig], Experiment | tuple[Experiment, ...]] | None = None
    expects: tuple[Ordering, ...] = ()


def grid(axes: dict[str, Sequence[Any]]) -> tuple[dict[str, Any], ...]:
    """Returns all combinations of the axes' values, the last axis fastest."""
    return tuple(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def add_mixers(study: Study, name: str, files: list[ModuleType]) -> list[Experiment]:
    """Returns an experiment (on each task) for every mixer config that the user's files define.

    A file gives either instances at module level (labelled by their variable), or classes with defaults for every
    field.

    Raises:
      UserError: the study takes no mixers, a file defines none, or a class needs arguments.
    """
    if files and study.template is None:
        raise UserError(f"{name} takes no mixers of your own")
    added: list[Experiment] = []
    for label, mixer in (item for file in files for item in mixers_of(file).items()):
        made = study.template(label, mixer)  # type: ignore[misc]
        added += made if isinstance(made, tuple) else [made]
    return added


def mixers_of(file: ModuleType, only: str = "") -> dict[str, MixerConfig]:
    """Returns the mixer configs that a file of the user's defines, by label: its instances, or else its classes; or the
    one called `only`. Raises UserError where there is none."""
    names = {name: value for name, value in vars(file).items() if not name.startswith("_")}
    instances = {name: value for name, value in names.items() if isinstance(value, MixerConfig)}
    classes = {
        name: value
        for name, value in names.items()
        if inspect.isclass(value) and issubclass(value, MixerConfig) and value.__module__ == file.__name__
    }
    if not instances and not classes:
        raise UserError(
            f"{file.__file__} defines no mixer config: an instance or a subclass of recollect.layers.mixer.MixerConfig"
        )
    if only and only not in {**classes, **instances}:
        listed = ", ".join({**instances, **classes})
        raise UserError(f"{file.__file__} defines no mixer {only!r}; it defines {listed}")
    chosen: Any = {only: {**classes, **instances}[only]} if only else instances or classes
    try:
        return {name: value if isinstance(value, MixerConfig) else value() for name, value in chosen.items()}
    except TypeError as error:
        raise UserError(f"{file.__file__}: {error}; make an instance of the class in the file") from error
