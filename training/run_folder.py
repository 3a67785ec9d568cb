"""A run's folder: config.json, environment.json, metrics.jsonl, checkpoints/, and result.json once it is done."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from recollect.configuration import UserError, to_json
from recollect.configuration.disk_full import DiskFull, is_disk_full
from recollect.configuration.io import write_json
from recollect.configuration.machine import environment
from recollect.configuration.python_files import USER_FILES
from recollect.configuration.read_json import finite, read_json_object
from recollect.training.distributed.host import current_host
from recollect.training.experiment import Experiment


def is_done(result: dict[str, Any] | None, steps: int) -> bool:
    """Returns whether result.json (None: there is none) says that none of `steps` is left; preempted runs go on."""
    if result is None or result["status"] == "preempted":
        return False
    return result["steps"] >= steps or result["status"] != "finished"


def read_result(folder: Path) -> dict[str, Any] | None:
    """Returns what a run folder's result.json holds, None where there is none; raises UserError where it is damaged."""
    path = folder / "result.json"
    if not path.exists():
        return None
    result = read_json_object(path)
    if not isinstance(result.get("status"), str) or not isinstance(result.get("steps"), int):
        raise UserError(f"{path} is damaged: it lacks status or steps; delete it to train on from the last checkpoint")
    return result


def json_line(data: dict[str, Any]) -> str:
    """Returns JSON on one line, with null for numbers that are not finite: JSON has no word for them."""
    try:
        return json.dumps(data, allow_nan=False)
    except ValueError:
        return json.dumps(finite(data))


class RunFolder:
    """Opens (or makes) the folder of one run. Every process of a run reads it; the main one alone writes.

    Raises:
      UserError: the folder belongs to another config (the differing fields are listed), or is not a run's folder.
    """

    def __init__(self, path: Path, experiment: Experiment):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._metrics = self.path / "metrics.jsonl"
        self.boards: list[Any] = []
        self.unwritten: list[str] = []
        self._writes = current_host().is_main
        config_path = self.path / "config.json"
        if config_path.exists():
            from recollect.training.resumed_config import check_resumable

            check_resumable(self.path, experiment)
        elif self._writes and self.path.exists() and any(path.name != "lock" for path in self.path.iterdir()):
            why = "is not empty and holds no config.json: not a run's folder"
            raise UserError(f"{self.path} {why}, so nothing is written there")
        if self._writes:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(config_path, to_json(experiment))
            except OSError as error:
                raise UserError(f"cannot write to {self.path}: {error.strerror}") from error

    def write(self, name: str, data: dict[str, Any]) -> None:
        """Writes a JSON file of this name, with null for numbers that are not finite."""
        if self._writes:
            write_json(self.path / name, json.loads(json_line(data)))

    def write_environment(self) -> None:
        """Writes what the run's bits depend on beside its config: versions, devices, user code; and the command."""
        self.write("environment.json", {**environment(), "command": sys.argv})
        if USER_FILES:
            from recollect.training.user_code import record

            record(self.path)

    def unfinish(self) -> None:
        """Deletes result.json, for a run that is to go on."""
        if self._writes:
            (self.path / "result.json").unlink(missing_ok=True)

    def log(self, record: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl and to `boards`; on a full disk it is held back, and written later."""
        for board in self.boards:
            board.record(record)
        self.unwritten.append(json_line(record) + "\n")
        with contextlib.suppress(DiskFull):  # see `held_back`
            self._write_lines()

    @property
    def held_back(self) -> bool:
        """Whether lines wait for space on the disk."""
        return bool(self.unwritten) and self._writes

    def flush(self, *, to_disk: bool = False) -> None:
        """Writes the lines that a full disk held back; `to_disk` also makes all lines outlive a loss of power.

        Raises:
          DiskFull: there is still no space. The file holds whole lines only, and the others are kept.
        """
        self._write_lines()
        if to_disk and self._writes and self._metrics.exists():
            with self._metrics.open("rb") as file:
                os.fsync(file.fileno())

    def _write_lines(self) -> None:
        if not self.held_back:
            return
        size = self._metrics.stat().st_size if self._metrics.exists() else 0
        try:
            with self._metrics.open("a") as file:
                file.write("".join(self.unwritten))
        except OSError as error:
            if not is_disk_full(error):
                raise
            if self._metrics.exists():
                os.truncate(self._metrics, size)
            raise DiskFull(f"{self._metrics} could not be written: no space is left on the disk") from error
        self.unwritten = []
