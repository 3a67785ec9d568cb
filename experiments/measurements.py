"""Measurements that a study goes on with: a row that its file holds is not measured again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.io import replacing, write_json
from recollect.configuration.read_json import read_json

Row = dict[str, Any]


class Measurements:
    """The rows of a JSON file, written whenever one is added."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = read_json(path) if path.exists() else []
        if not isinstance(self.rows, list) or not all(isinstance(row, dict) for row in self.rows):
            raise UserError(f"{path} holds no list of measurements; move it away to measure anew")

    def of(self, what: Row, measure: Callable[[], Row]) -> Row:
        """Returns the row that has the entries of `what`, JSON-ready; where there is none, `what` with those of
        `measure`."""
        for row in self.rows:
            if all(name in row and row[name] == value for name, value in what.items()):
                return row
        row = what | measure()
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.rows)
        return row


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV; an entry of several values has a column for each, `entry[key]`."""
    flat = [_flat(row) for row in rows]
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in flat for name in row)))
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Row) -> Row:
    flat: Row = {}
    for name, value in row.items():
        flat |= {f"{name}[{key}]": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
