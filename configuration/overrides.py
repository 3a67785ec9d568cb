"""`path=value` overrides on a finished config, for the command line and for sweeps.

Paths are dotted (`model.stages.0.pattern.1.window=32`), `...name=value` sets every field of that name, and a value that
names a config class swaps the class at that path (`model.stages.0.pattern.1=SlidingWindow`).
"""

from __future__ import annotations

from typing import Any, TypeVar

import chz
from chz.blueprint import Castable, ExtraneousBlueprintArg, InvalidBlueprintArg, MissingBlueprintArg

from recollect.configuration.base import Config, UserError
from recollect.configuration.names import config_class

T = TypeVar("T", bound=Config)


def apply_overrides(config: T, arguments: list[str]) -> T:
    """Returns `config` with each `path=value` of `arguments` applied, later ones winning.

    Raises:
      UserError: no such field, a value of the wrong type, a config the classes refuse, or an argument without '='.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        path, equals, value = argument.partition("=")
        if not equals or not all(path.removeprefix("...").split(".")) or path.startswith("-"):
            form = "an override has the form path=value, for example optimizer.learning_rate=1e-3"
            raise UserError(f"cannot read {argument!r}: {form}")
        values[path] = Castable(value)
    return apply_values(config, values)


def apply_values(config: T, values: dict[str, Any]) -> T:
    """`apply_overrides` for values that are Python objects (a sweep's points) or `Castable` strings."""
    if not values:
        return config
    preset = chz.beta_to_blueprint_values(config)
    swapped: dict[str, Any] = {}
    for path, value in values.items():
        _open_empty_tuples(preset, path)
        if isinstance(value, Castable):
            value = _read(path, value, [preset[key] for key in preset if matches(path, key)])
        if value is None or isinstance(value, (Config, type)) or _is_none(value):
            _drop(preset, path)  # fields of what stood there would be extraneous on what takes its place
        if isinstance(value, Config):
            fields = chz.beta_to_blueprint_values(value)
            swapped |= {f"{path}.{key}" if key else path: item for key, item in fields.items()}
            value = type(value)
        swapped[path] = value
    try:
        blueprint = chz.Blueprint(type(config)).apply(preset, layer_name="the experiment")
        return blueprint.apply(swapped, layer_name="the command line").make()
    except UserError:
        raise
    except (ExtraneousBlueprintArg, InvalidBlueprintArg, MissingBlueprintArg, TypeError, ValueError) as error:
        from recollect.configuration.override_errors import explain

        raise UserError(explain(config, error, values)) from error


def _is_none(value: Any) -> bool:
    return isinstance(value, Castable) and value.value in ("None", "none")


def _read(path: str, value: Castable, current: list[Any]) -> Any:
    """Returns what a string from the command line stands for, where `current` values stand."""
    text = value.value
    if any(isinstance(item, type) and issubclass(item, Config) for item in current) and not _is_none(value):
        try:
            return config_class(text)
        except UserError as error:
            raise UserError(f"{path}={text}: {error}") from error
    if text == "none" and not any(isinstance(item, str) for item in current):
        return Castable("None")
    # chz would import the module that a text names, or evaluate it; only text fields take a plain string.
    return text if may_name_code(text) else value


def _open_empty_tuples(preset: dict[str, Any], path: str) -> None:
    """Forgets values () above `path`: chz takes elements only where no value of the whole tuple stands."""
    while path := path.rpartition(".")[0]:
        if preset.get(path) == ():
            del preset[path]


def _drop(preset: dict[str, Any], pattern: str) -> None:
    roots = [key for key in preset if matches(pattern, key)]
    for key in [key for key in preset if any(key == root or key.startswith(f"{root}.") for root in roots)]:
        del preset[key]


def matches(pattern: str, path: str) -> bool:
    """Returns whether an override's path, which may be a wildcard, means the field at `path`."""
    if not pattern.startswith("..."):
        return pattern == path
    tail = pattern[3:]
    return path == tail or path.endswith("." + tail)


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
