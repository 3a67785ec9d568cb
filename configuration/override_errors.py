"""What was wrong with an override, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import chz
from chz.blueprint import Castable

from recollect.configuration.base import Config, UserError
from recollect.configuration.field_hints import suggestion
from recollect.configuration.field_types import family_at, get_field, listed
from recollect.configuration.overrides import matches, may_name_code

ALL_FIELDS = "`describe NAME --config` lists every field"


def explain(config: Config, error: Exception, values: dict[str, Any]) -> str:
    """Returns an error's message as one line that names the override; chz's run over several lines."""
    if isinstance(error, (TypeError, ValueError)):
        return _blame(str(error).replace(" X_", " "), values)
    for path, value in sorted(values.items(), key=lambda item: -len(item[0])):  # `a.b` before `a`
        if path in str(error) and not path.startswith("..."):
            if isinstance(error, chz.blueprint.ExtraneousBlueprintArg):
                return _unknown_field(config, path, _shown(value))
            if "subparameters were provided" in str(error):
                return _unknown_field(config, path, _shown(value))
            cast = re.search(r"Could not cast .*", str(error))
            reason = cast.group(0) if cast else str(error).splitlines()[0]
            return f"{path}={_shown(value)}: {reason}{_what_can_stand(config, path, _shown(value))}"
        if path.startswith("...") and f"'{path}'" in str(error):
            for owner in _configs_in(config):
                if path[3:] in owner.RETIRED:
                    return f"{path}={_shown(value)}: {owner.RETIRED[path[3:]]}"
            hint = suggestion(config, path[3:], _shown(value))
            return f"{path}={_shown(value)}: nothing in the experiment has a field {path[3:]!r}{hint}; {ALL_FIELDS}"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip() and "--help" not in line)


def _what_can_stand(config: Config, path: str, value: str) -> str:
    """Returns the ending of an error at a field of classes: those that it takes, and how a tuple of them is written."""
    family = family_at(config, path)
    if not family:
        return ""
    parent, last = _deepest(config, path)
    form = f"; a tuple is written ({value},)" if parent == path and isinstance(last, tuple) else ""
    return f"; there are {listed(family)}{form}"


def _unknown_field(config: Config, path: str, value: Any) -> str:
    """Returns what is wrong with a path of which a part is no field: where, its siblings, and what may be meant."""
    prefix, owner = _deepest(config, path.rpartition(".")[0])
    missing = path[len(prefix) :].lstrip(".").split(".")[0]
    where = f"{prefix or 'the experiment'} ({type(owner).__name__})"
    if missing in getattr(owner, "RETIRED", {}):
        return f"{path}={value}: {owner.RETIRED[missing]}"
    hint = suggestion(config, path, value)
    if isinstance(owner, tuple):
        return f"{path}={value}: {where} has no field {missing!r}; it has 0 to {len(owner) - 1}{hint}"
    fields = chz.chz_fields(owner) if chz.is_chz(owner) else {}
    siblings = f" has {', '.join(fields)}" if fields else " is a value, without fields"
    end = f"{hint} It{siblings}" if hint else f"; it{siblings}"
    return f"{path}={value}: {where} has no field {missing!r}{end} ({ALL_FIELDS})"


def _blame(message: str, values: dict[str, Any]) -> str:
    """Returns a type error's message, which names a field only, with the override that set it."""
    field = re.match(r"Expected '?([\w.]+)'? to be", message)
    for path, value in values.items():
        names = [name for name in path.split(".") if name and not name.isdigit()]
        if field and names and (matches(path, field[1]) or names[-1] == field[1]):
            refused = isinstance(value, Castable) and may_name_code(value.value)
            return f"{path}={_shown(value)}: {message}" + ("; a value that names code is refused" if refused else "")
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
