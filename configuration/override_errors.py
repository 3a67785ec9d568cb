"""What was wrong with an override, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import chz
from chz.blueprint import Castable

from recollect.configuration.base import Config, UserError
from recollect.configuration.field_hints import class_hint, suggestion
from recollect.configuration.field_types import expected, family_at, get_field, listed
from recollect.configuration.overrides import matches, may_name_code

ALL_FIELDS = "`describe NAME --config` lists every field"
REFUSED = "; a value that names code is refused"


def explain(config: Config, error: Exception, values: dict[str, Any], *changed: dict[str, Any]) -> str:
    """Returns an error's message as one line that names the override; chz's run over several lines.

    Args:
      values: of the overrides, by path.
      changed: the config as chz's blueprint values without what the overrides replace, and what they put in.
    """
    if isinstance(error, UserError):
        return _with_path(str(error), values)
    config = _with_classes(config, *changed)
    if isinstance(error, (TypeError, ValueError)):
        return _blame(config, str(error).replace(" X_", " "), values)
    patterns = (r"Extraneous argument '([^']+)'", r"e\.g\. '([^']+)'", r"param '([^']+)'")
    if missing := re.match(r"Missing required arguments for parameter\(s\): (.*)", str(error)):
        for above, value in values.items():
            if missing[1].startswith(above.rpartition(".")[0]):
                return f"{above}={_shown(value)}: {missing[1]} must be set too"
    place = next((match[1] for pattern in patterns if (match := re.search(pattern, str(error)))), "")
    path = place if place in values else next((path for path in values if matches(path, place)), None)
    if path is None:
        return " ".join(line.strip() for line in str(error).splitlines() if line.strip() and "--help" not in line)
    value = _shown(values[path])
    if not isinstance(error, chz.blueprint.ExtraneousBlueprintArg) and "subparameters" not in str(error):
        return f"{path}={value}: {_what_can_stand(config, place, value)}"
    if "..." not in path:
        return _unknown_field(config, path, value)
    name = path.partition("...")[2]
    for owner in _configs_in(config):
        if name in owner.RETIRED:
            return f"{path}={value}: {owner.RETIRED[name]}"
    hint = suggestion(config, name, value)
    return f"{path}={value}: nothing in the experiment has a field {name!r}{hint}; {ALL_FIELDS}"


def _with_path(message: str, values: dict[str, Any]) -> str:
    """Returns the message of a validator, which begins with a field's name, with the whole path of its override."""
    name, equals, rest = message.partition("=")
    for path, value in values.items():
        if equals and path.endswith(f".{name}") and rest.startswith((f"{_shown(value)}:", f"{_shown(value)} ")):
            return f"{path}={rest}"
    for path in values:  # the value may be shown in another form: 1e-1 as 0.1
        if equals and path.endswith(f".{name}") and sum(other.endswith(f".{name}") for other in values) == 1:
            return f"{path}={rest}"
    return message


def _with_classes(config: Config, preset: dict[str, Any], put_in: dict[str, Any]) -> Config:
    """Returns a config with the classes that overrides put in and none of their values; itself where that fails."""
    classes = {path: value for path, value in put_in.items() if isinstance(value, type)}
    try:
        return chz.Blueprint(type(config)).apply(preset).apply(classes).make()
    except Exception:  # whatever the classes refuse: the error that is being explained is of more use
        return config


def _what_can_stand(config: Config, path: str, value: str) -> str:
    """Returns why a field does not take a text, and what it takes."""
    family = family_at(config, path)
    if not family:
        return f"must be {expected(config, path)}"
    parent, last = _deepest(config, path)
    names = listed(family).split(", ")
    if parent != path or not isinstance(last, tuple):
        return f"is none of its classes{class_hint(value, names)}; there are {', '.join(names)}"
    if any(value.count(opened) != value.count(closed) for opened, closed in ("()", "[]")):
        return f"a bracket is not closed; a tuple is written ({names[0]}, {names[-1]}) in quotes"
    elements = value.strip("()[], ") or names[0]
    form = f"a tuple is written ({elements},)" if elements.isidentifier() else f"a tuple is written ({names[0]},)"
    return f"{form}; there are {', '.join(names)}" if len(names) > 1 else form


def _unknown_field(config: Config, path: str, value: Any) -> str:
    """Returns what is wrong with a path of which a part is no field: where, its siblings, and what may be meant."""
    prefix, owner = _deepest(config, path.rpartition(".")[0])
    missing = path[len(prefix) :].lstrip(".").split(".")[0]
    where = f"{prefix or 'the experiment'} ({type(owner).__name__})"
    if missing in getattr(owner, "RETIRED", {}):
        return f"{path}={value}: {owner.RETIRED[missing]}"
    if owner is None and (family := family_at(config, prefix)):
        classes = listed(family).replace(", ", f" or {prefix}=")
        return f"{path}={value}: {prefix} is None; set {prefix}={classes} first"
    hint = suggestion(config, path, value)
    if isinstance(owner, tuple):
        return f"{path}={value}: {where} has no field {missing!r}; it has 0 to {len(owner) - 1}{hint}"
    fields = chz.chz_fields(owner) if chz.is_chz(owner) else {}
    siblings = f" has {', '.join(fields)}" if fields else " is a value, without fields"
    end = f"{hint} It{siblings}" if hint.endswith("?") else f"{hint}; it{siblings}"
    return f"{path}={value}: {where} has no field {missing!r}{end} ({ALL_FIELDS})"


def _blame(config: Config, message: str, values: dict[str, Any]) -> str:
    """Returns a type error's message, which names a field only, with the override that set it."""
    field = re.match(r"Expected '?([\w.]+)'? to be", message)
    for path, value in values.items():
        names = [name for name in path.split(".") if name and not name.isdigit()]
        if field and names and (matches(path, field[1]) or names[-1] == field[1]):
            if isinstance(value, Castable) and may_name_code(value.value):
                return f"{path}={_shown(value)}: {_what_can_stand(config, field[1], _shown(value))}{REFUSED}"
            return f"{path}={_shown(value)}: {message}"
    return message


def _deepest(config: Any, path: str) -> tuple[str, Any]:
    """Returns the longest prefix of `path` that exists, and the value there."""
    parts = path.split(".") if path else []
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        try:
            return prefix, get_field(config, prefix)
        except UserError:
            continue
    return "", config


def _configs_in(value: Any) -> Iterator[Config]:
    """Yields a config and all those in its fields."""
    if isinstance(value, tuple):
        for item in value:
            yield from _configs_in(item)
    elif isinstance(value, Config):
        yield value
        yield from _configs_in(tuple(getattr(value, name) for name in chz.chz_fields(value)))


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, Castable) else value
