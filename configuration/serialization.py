"""Configs as JSON: class names and values, no code. Reading them: deserialization.py."""

from __future__ import annotations

from typing import Any

import chz

from recollect.configuration.base import Config
from recollect.configuration.io import flatten

SCHEMA_VERSION = 1


def to_json(config: Config) -> dict[str, Any]:
    """Returns a JSON-ready dict: `{"class": name, field: value, ...}` per config, `schema_version` in the outermost."""
    return {"schema_version": SCHEMA_VERSION, **_encode(config)}


def differences(left: Config, right: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted paths at which two configs differ, with both values; None for an absent field."""
    a, b = flatten(_encode(left)), flatten(_encode(right))
    return {path: (a.get(path), b.get(path)) for path in sorted(a.keys() | b.keys()) if a.get(path) != b.get(path)}


def _encode(value: Any) -> Any:
    if isinstance(value, Config):
        fields = {name: _encode(getattr(value, name)) for name in chz.chz_fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a config cannot hold a {type(value).__name__}: {value!r}")
