"""`path=value` overrides on a finished config, for the command line and for sweeps.

Paths are dotted (`model.stages.0.pattern.1.window=32`), `...name=value` sets all of that name (`model...name`: below
model), and a value that names a config class swaps the class at that path (`model.stages.0.pattern.1=SlidingWindow`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import chz
from chz.blueprint import Castable, ExtraneousBlueprintArg, InvalidBlueprintArg, MissingBlueprintArg

from recollect.configuration.base import Config, UserError

T = TypeVar("T", bound=Config)


def apply_overrides(config: T, arguments: list[str], log: Callable[[str], None] | None = None) -> T:
    """Returns `config` with each `path=value` of `arguments` applied, later ones winning; `log` receives a line for
    each class that was swapped: which fields it kept.

    Raises:
      UserError: no such field, a value of the wrong type, a config the classes refuse, or an argument without '='.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        path, equals, value = argument.partition("=")
        if not equals or not all(path.replace("...", ".", 1).removeprefix(".").split(".")) or path.startswith("-"):
            raise UserError(f"cannot read {argument!r}: an override has the form path=value, for example run.steps=400")
        if path in values and log:
            log(f"{argument} replaces {path}={values[path].value}")
        values[path] = Castable(value)
    return apply_values(config, values, log)


def apply_values(config: T, values: dict[str, Any], log: Callable[[str], None] | None = None) -> T:
    """`apply_overrides` for values that are Python objects (a sweep's points) or `Castable` strings."""
    if not values:
        return config
    preset = chz.beta_to_blueprint_values(config)
    swapped: dict[str, Any] = {}
    swaps: list[Any] = []
    if any(isinstance(value, Castable) and "(" in value.value for value in values.values()):
        from recollect.configuration.class_swaps import expanded

        values = expanded(config, preset, values)
    for path, value in values.items():
        if any(part.isdigit() for part in path.split(".")):
            from recollect.configuration.class_swaps import open_tuples

            open_tuples(preset, swapped, path, value)
        if isinstance(value, Castable):
            value = _read(config, path, value, [key for key in preset if matches(path, key)], preset)
        if value is None or isinstance(value, (Config, type)) or _is_none(value):
            from recollect.configuration.class_swaps import replace

            value = replace(preset, swapped, swaps, path, value)
        swapped[path] = value
    try:
        blueprint = chz.Blueprint(type(config)).apply(preset, layer_name="the experiment")
        made = blueprint.apply(swapped, layer_name="the command line").make()
    except (ExtraneousBlueprintArg, InvalidBlueprintArg, MissingBlueprintArg, TypeError, ValueError) as error:
        from recollect.configuration.override_errors import explain

        raise UserError(explain(config, error, values, preset, swapped)) from error
    if log:
        [log(swap.describe(made, values)) for swap in swaps]
    return made


def _is_none(value: Any) -> bool:
    return isinstance(value, Castable) and value.value in ("None", "none")


def _read(config: Config, path: str, value: Castable, places: list[str], preset: dict[str, Any]) -> Any:
    """Returns what a string from the command line stands for at `places` of the config."""
    text, current = value.value, [preset[place] for place in places]
    if any(isinstance(item, type) for item in current) and not _is_none(value):
        from recollect.configuration.field_types import class_at

        return class_at(config, path, places[0], text)
    if text == "none" and not any(isinstance(item, str) for item in current):
        return Castable("None")
    # chz would import the module that a text names, or evaluate it; only text fields take a plain string.
    return text if may_name_code(text) else value


def matches(pattern: str, path: str) -> bool:
    """Returns whether an override's path, which may be a wildcard, means the field at `path`."""
    head, wild, tail = pattern.partition("...")
    return path.startswith(head and f"{head}.") and f".{path}".endswith(f".{tail}") if wild else path == pattern


def may_name_code(text: str) -> bool:
    """Returns whether chz might take `text` for `module:name`, `module.name` or a lambda. Numbers, and tuples of
    them, may have a point."""
    return ":" in text or any("." in part and not _is_number(part) for part in text.strip("()[]").split(","))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
