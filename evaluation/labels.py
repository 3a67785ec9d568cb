"""Fields of the configs of runs, and labels that name those in which runs differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from recollect.configuration.short_paths import short_paths

Fields = frozenset[tuple[str, str]]
"""(path, value as JSON text) of some fields of a run."""


def config_fields(config: dict[str, Any], *starts: str) -> dict[str, str]:
    """Returns the fields of a run's config whose paths begin so ("model.", "run.steps"), as JSON text. The class of a
    part is the value of its path; a list of plain values is one value; None is left out."""
    return {path: value for path, value in _flat(config).items() if f"{path}.".startswith(starts)}


def _flat(tree: Any, path: str = "") -> dict[str, str]:
    if isinstance(tree, list) and any(isinstance(item, dict | list) for item in tree):
        tree = {str(index): item for index, item in enumerate(tree)}
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        return {path: json.dumps(tree)}
    flat = {path: json.dumps(tree["class"])} if path and "class" in tree else {}
    for name, value in tree.items():
        if path and name == "class":
            continue
        flat |= _flat(value, f"{path}.{name}" if path else str(name))
    return flat


def label(name: str, fields: Fields, namesakes: Sequence[Fields]) -> str:
    """Returns a name with the fields in which those of that name differ, `name [pairs=2, lora=LoRA]`: values as the
    command line writes them. What a part has that others lack or replace by another class is not named beside it."""
    values, others = dict(fields), [dict(other) for other in namesakes]
    differing = [path for path in sorted({path for other in others for path in other}) if _differs(path, others)]
    names = short_paths(differing)
    shown = [f"{names[path]}={written(values[path])}" for path in differing if path in values]
    return f"{name} [{', '.join(shown)}]" if shown else name


def _differs(path: str, configs: list[dict[str, str]]) -> bool:
    """Returns whether configs differ in a field, and not only because they differ in a part that it belongs to."""
    holders = [config for config in configs if path in config]
    if len({config[path] for config in holders}) > 1:
        return True
    parts = path.split(".")
    above = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(
        all(config.get(part) == holders[0].get(part) for part in above) for config in configs if path not in config
    )


def written(value: str) -> str:
    """Returns a field's JSON text as the command line writes it."""
    read = json.loads(value)
    return ",".join(map(str, read)) if isinstance(read, list) else str(read)
