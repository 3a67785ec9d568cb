"""The tables of measured block sizes: one JSON file a kind of device, written by measure.py alone."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Sizes = dict[str, int]
Key = Mapping[str, str | int | bool]

FOLDER = Path(__file__).parent

COUNTS = ("b", "t", "h")
"""The parts of a key in which an entry may differ from what is asked: sequences, tokens, heads."""


def path_of(device: str) -> Path:
    """Returns the file of a kind of device: "NVIDIA H100 80GB HBM3" has nvidia_h100_80gb_hbm3.json."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")


def find(device: str, operation: str, key: Key) -> Sizes | None:
    """Returns the sizes of the entry that serves a key (see the package), or None.

    Raises:
      ValueError: the table cannot be read.
    """
    fitting = [entry for entry in read(device).get(operation, ()) if _same_but_counts(entry["key"], key)]
    return min(fitting, key=lambda entry: _distance(entry["key"], key))["sizes"] if fitting else None


def read(device: str) -> dict[str, list[dict[str, Any]]]:
    """Operation -> entries of one device, each {"key", "sizes", "milliseconds", "heuristic_milliseconds", "jax",
    "date"}; {} without a table.

    Raises:
      ValueError: the file is no table of this device.
    """
    return _read(path_of(device), device)


def write(device: str, operation: str, entries: Sequence[Mapping[str, Any]]) -> Path:
    """Replaces one operation's entries in a device's table, and returns the file."""
    path = path_of(device)
    operations = dict(read(device))
    operations[operation] = [dict(entry) for entry in entries]
    text = json.dumps({"device": device, "operations": dict(sorted(operations.items()))}, indent=1) + "\n"
    path.write_text(text)
    _read.cache_clear()
    return path


@functools.cache
def _read(path: Path, device: str) -> dict[str, list[dict[str, Any]]]:
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        if table["device"] != device:
            raise ValueError(f"it is of {table['device']!r}")
        for entries in table["operations"].values():
            for entry in entries:
                if not all(isinstance(size, int) for size in entry["sizes"].values()) or not isinstance(
                    entry["key"], dict
                ):
                    raise ValueError(f"not an entry: {entry}")
        return table["operations"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of block sizes of {device!r}: {error}") from error


def _same_but_counts(entry: Key, key: Key) -> bool:
    """Returns whether two keys are equal but for counts, by type too: JSON distinguishes true from 1, == does not."""
    return entry.keys() == key.keys() and all(
        name in COUNTS or (type(entry[name]) is type(value) and entry[name] == value) for name, value in key.items()
    )


def _distance(entry: Key, key: Key) -> float:
    return sum(abs(math.log2(float(entry[name]) / float(key[name]))) for name in COUNTS if name in key)
