"""`path=value` overrides on a finished config, for the command line and for sweeps.

Paths are dotted (`model.stages.0.pattern.1.window=32`), `...name=value` sets every field of that name, and a value that
names a config class swaps the class at that path (`model.stages.0.pattern.1=SlidingWindow`).
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import chz
from chz.blueprint import Castable

from recollect.configuration.base import Config, UserError, config_class, nearest

T = TypeVar("T", bound=Config)


def apply_overrides(config: T, arguments: list[str]) -> T:
    """Returns `config` with each `path=value` of `arguments` applied, later ones winning.

    Raises:
      UserError: no such field, a value of the wrong type, a config the classes refuse, or an argument without '='.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        path, equals, value = argument.partition("=")
        if not equals or not path or path.startswith("-"):
            raise UserError(
                f"cannot read {argument!r}: an override has the form path=value, "
                "for example optimizer.learning_rate=1e-3"
            )
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
            text = value.value
            current = [preset[key] for key in preset if _matches(path, key)]
            if any(isinstance(item, type) and issubclass(item, Config) for item in current) and text not in (
                "None",
                "none",
            ):
                value = _named_class(path, text)
            elif _may_name_code(text):
                value = (
                    text  # chz would import the module it names, or evaluate it; only text fields take a plain string
                )
        if isinstance(value, Config):
            swapped.update(
                {f"{path}.{key}" if key else path: item for key, item in chz.beta_to_blueprint_values(value).items()}
            )
            swapped[path] = type(value)
            _drop(preset, path)
            continue
        if isinstance(value, type) or _removes(value):
            # The old class's fields would be extraneous on the new one.
            _drop(preset, path)
        swapped[path] = value
    try:
        return (
            chz.Blueprint(type(config))
            .apply(preset, layer_name="the experiment")
            .apply(swapped, layer_name="the command line")
            .make()
        )
    except UserError:
        raise
    except (
        chz.blueprint.ExtraneousBlueprintArg,
        chz.blueprint.InvalidBlueprintArg,
        chz.blueprint.MissingBlueprintArg,
    ) as error:
        raise UserError(_explain(config, error, values)) from error
    except (TypeError, ValueError) as error:
        raise UserError(_blame(str(error).replace(" X_", " "), values)) from error


def get_field(config: Config, path: str) -> Any:
    """Returns the value at a dotted path.

    Raises:
      UserError: there is no such field.
    """
    value: Any = config
    seen: list[str] = []
    for name in path.split("."):
        fields = chz.chz_fields(value) if chz.is_chz(value) else {}
        if isinstance(value, tuple) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif name in fields:
            value = getattr(value, name)
        else:
            where = ".".join(seen) or "the experiment"
            raise UserError(f"{path}: {where} has no field {name!r}{nearest(name, fields)}")
        seen.append(name)
    return value


def _matches(pattern: str, path: str) -> bool:
    if not pattern.startswith("..."):
        return pattern == path
    tail = pattern[3:]
    return path == tail or path.endswith("." + tail)


def _removes(value: Any) -> bool:
    return value is None or (isinstance(value, Castable) and value.value in ("None", "none"))


def _named_class(path: str, text: str) -> type[Config]:
    try:
        return config_class(text)
    except UserError as error:
        raise UserError(f"{path}={text}: {error}") from error


def _may_name_code(text: str) -> bool:
    """Whether chz might take `text` for `module:name`, `module.name` or a lambda. Numbers, and tuples of them, may
    have a point."""
    return ":" in text or any("." in part and not _is_number(part) for part in text.strip("()[]").split(","))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, Castable) else value


def _open_empty_tuples(preset: dict[str, Any], path: str) -> None:
    """Forgets values () above `path`: chz takes elements only where no value of the whole tuple stands."""
    parent = path.rpartition(".")[0]
    while parent:
        if preset.get(parent) == ():
            del preset[parent]
        parent = parent.rpartition(".")[0]


def _drop(preset: dict[str, Any], pattern: str) -> None:
    roots = [key for key in preset if _matches(pattern, key)]
    for root in roots:
        for key in list(preset):
            if key == root or key.startswith(root + "."):
                del preset[key]


def _explain(config: Config, error: Exception, values: dict[str, Any]) -> str:
    """chz's messages run over several lines; the user gets one."""
    for path, value in values.items():
        if path in str(error) and not path.startswith("..."):
            shown = _shown(value)
            parent, _, name = path.rpartition(".")
            if isinstance(error, chz.blueprint.ExtraneousBlueprintArg):
                prefix, owner = _deepest(config, parent)
                fields = chz.chz_fields(owner) if chz.is_chz(owner) else {}
                missing = path[len(prefix) :].lstrip(".").split(".")[0] or name
                where = f"{prefix or 'the experiment'} ({type(owner).__name__})"
                return f"{path}={shown}: {where} has no field {missing!r}{nearest(missing, fields)}"
            cast = re.search(r"Could not cast .*", str(error))
            return f"{path}={shown}: {cast.group(0) if cast else str(error).splitlines()[0]}"
        if path.startswith("...") and f"'{path}'" in str(error):
            names = {key.rpartition(".")[2] for key in chz.beta_to_blueprint_values(config)}
            return (
                f"{path}={_shown(value)}: nothing in the experiment has a field {path[3:]!r}{nearest(path[3:], names)}"
            )
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip() and "--help" not in line)


def _blame(message: str, values: dict[str, Any]) -> str:
    """A type error names a field only: adds the override that set it."""
    field = re.match(r"Expected '?([\w.]+)'? to be", message)
    for path, value in values.items():
        names = [name for name in path.split(".") if name and not name.isdigit()]
        if field and names and (_matches(path, field[1]) or names[-1] == field[1]):
            refused = isinstance(value, Castable) and _may_name_code(value.value)
            return f"{path}={_shown(value)}: {message}" + ("; a value that names code is refused" if refused else "")
    return message


def _deepest(config: Any, path: str) -> tuple[str, Any]:
    """The longest prefix of `path` that exists, and the value there."""
    parts = path.split(".") if path else []
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        try:
            return prefix, get_field(config, prefix)
        except UserError:
            continue
    return "", config
