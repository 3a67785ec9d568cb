"""Configs of many runs: each whole, as the page holds it, and the fields in which they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from recollect.configuration.io import flatten

NEVER_COMPARED = ("run.directory", "schema_version", "name", "task")

Config = dict[str, Any]


def pooled(configs: Sequence[Config]) -> tuple[dict[str, Any], list[list[tuple[int, int]]]]:
    """Returns the configs of runs without repeating what they have in common: the page holds thousands.

    Returns:
      "paths", all dotted paths in their order; "values", all values as text; "shared", the (path, value) places of the
      fields that all configs have alike; and, for each config, the places of its other fields.
    """
    flat = [_flat(config) for config in configs]
    paths = {path: place for place, path in enumerate(_ordered(flat))}
    values: dict[str, int] = {}
    coded = [{paths[path]: values.setdefault(value, len(values)) for path, value in config.items()} for config in flat]
    alike = set.intersection(*(set(fields.items()) for fields in coded)) if coded else set()
    pool = {"paths": list(paths), "values": list(values), "shared": sorted(alike)}
    return pool, [[field for field in fields.items() if field not in alike] for fields in coded]


def differences(groups: Mapping[str, Sequence[Config]]) -> list[dict[str, Any]]:
    """Returns the config fields in which runs differ, each with its values by group."""
    flat = {label: [_flat(config) for config in members] for label, members in groups.items()}
    everything = [config for configs in flat.values() for config in configs]
    rows = []
    for path in _ordered(everything):
        if path in NEVER_COMPARED or len({config.get(path) for config in everything}) == 1:
            continue
        values = [sorted({config.get(path, "") for config in configs}, key=_by_size) for configs in flat.values()]
        rows.append({"path": path, "values": values})
    return rows


def _flat(config: Config) -> dict[str, str]:
    return flatten(config, leaf=lambda value: value if isinstance(value, str) else json.dumps(value))


def _ordered(flat: Sequence[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(path for config in flat for path in config))


def _by_size(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value
