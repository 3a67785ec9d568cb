"""What was wrong with an override, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import chz
from chz.blueprint import Castable

from recollect.configuration.base import Config, UserError
from recollect.configuration.names import nearest
from recollect.configuration.overrides import matches, may_name_code


def explain(config: Config, error: Exception, values: dict[str, Any]) -> str:
    """Returns an error's message as one line that names the override; chz's run over several lines."""
    if isinstance(error, (TypeError, ValueError)):
        return _blame(str(error).replace(" X_", " "), values)
    for path, value in values.items():
        if path in str(error) and not path.startswith("..."):
            shown = _shown(value)
            parent, _, name = path.rpartition(".")
            if isinstance(error, chz.blueprint.ExtraneousBlueprintArg):
                prefix, owner = _deepest(config, parent)
                fields = chz.chz_fields(owner) if chz.is_chz(owner) else {}
                missing = path[len(prefix) :].lstrip(".").split(".")[0] or name
                where = f"{prefix or 'the experiment'} ({type(owner).__name__})"
                if missing in getattr(owner, "RETIRED", {}):
                    return f"{path}={shown}: {owner.RETIRED[missing]}"
                return f"{path}={shown}: {where} has no field {missing!r}{nearest(missing, fields)}"
            cast = re.search(r"Could not cast .*", str(error))
            return f"{path}={shown}: {cast.group(0) if cast else str(error).splitlines()[0]}"
        if path.startswith("...") and f"'{path}'" in str(error):
            for owner in _configs_in(config):
                if path[3:] in owner.RETIRED:
                    return f"{path}={_shown(value)}: {owner.RETIRED[path[3:]]}"
            names = {key.rpartition(".")[2] for key in chz.beta_to_blueprint_values(config)}
            return (
                f"{path}={_shown(value)}: nothing in the experiment has a field {path[3:]!r}{nearest(path[3:], names)}"
            )
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip() and "--help" not in line)


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
