"""Configs from JSON, and how two differ. Reading never imports or calls what a file names."""

from __future__ import annotations

import types
import typing
from typing import Any

import chz

from recollect.configuration.base import SCHEMA_VERSION, Config, UserError, encoded
from recollect.configuration.io import flatten
from recollect.configuration.names import config_class, nearest


def from_json(data: dict[str, Any]) -> Config:
    """Rebuilds what `to_json` wrote.

    Raises:
      UserError: unknown schema version, class or field, or a value its class refuses.
    """
    if not isinstance(data, dict):
        raise UserError("a config file holds one JSON object")
    data = dict(data)
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise UserError(f"the config has schema version {version!r}; this version of Recollect reads {SCHEMA_VERSION}")
    return _decode(data, "config")


def _decode(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, f"{path}.{index}") for index, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    if "class" not in value:
        raise UserError(f"{path}: an object without a 'class'")
    cls = _class_of(value["class"]) if isinstance(value["class"], str) else None
    if cls is None:
        raise UserError(f"{path}: 'class' is not a name")
    fields = chz.chz_fields(cls)
    left_out = {"class", *cls.RETIRED}
    values = {name: _decode(item, f"{path}.{name}") for name, item in value.items() if name not in left_out}
    for name in values:
        if name not in fields:
            raise UserError(f"{path}: {cls.__name__} has no field {name!r}{nearest(name, fields)}")
        if isinstance(values[name], int) and not isinstance(values[name], bool) and _is_float(fields[name].final_type):
            values[name] = float(values[name])  # JSON writes 1.0 as 1 in other tools
    try:
        return cls(**values)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {str(error).replace(' X_', ' ')}") from error


def _class_of(name: str) -> type[Config]:
    try:
        return config_class(name)
    except UserError as error:
        raise UserError(f"{error}; if it is a class of your own, name its file with --with FILE.py") from error


def _is_float(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
        return float in members and int not in members
    return annotation is float


def differences(left: Config, right: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted paths at which two configs differ, with both values; None for an absent field."""
    a, b = flatten(encoded(left)), flatten(encoded(right))
    return {path: (a.get(path), b.get(path)) for path in sorted(a.keys() | b.keys()) if a.get(path) != b.get(path)}
