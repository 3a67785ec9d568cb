"""A run's folder: config.json, environment.json, metrics.jsonl, checkpoints/, and result.json once it is done."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from recollect.configuration import UserError, differences, from_json, to_json
from recollect.configuration.io import DiskFull, is_disk_full, read_json, replace_text, write_json
from recollect.training.distributed.host import current_host
from recollect.training.experiment import CHANGEABLE, Experiment

PROJECT = Path(__file__).resolve().parent.parent


def is_done(result: dict[str, Any] | None, steps: int) -> bool:
    """Whether a run's result.json (None: there is none) says that nothing of `steps` steps is left to do; a
    preempted run goes on."""
    return (
        result is not None
        and result["status"] != "preempted"
        and (result["steps"] >= steps or result["status"] != "finished")
    )


class RunFolder:
    """Opens (or makes) the folder of one run. Every process of a run reads it, the main one alone writes.

    Raises:
      UserError: the folder belongs to another config (the differing fields are listed), or is not a run's folder.
    """

    def __init__(self, path: Path, experiment: Experiment):
        self.path = Path(path)
        config_path = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a run needs a folder")
        if config_path.exists():
            self._check(config_path, experiment)
        elif (
            current_host().is_main and self.path.exists() and any(self.path.iterdir())
        ):  # others may see the main process' first file half written
            raise UserError(
                f"{self.path} is not empty and holds no config.json: not a run's folder, so nothing is written there"
            )
        self._unwritten: list[str] = []
        if not current_host().is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(config_path, to_json(experiment))
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}") from error

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def result(self) -> dict[str, Any] | None:
        """result.json, or None while the run is not done."""
        path = self.path / "result.json"
        return read_json(path) if path.exists() else None

    def write_environment(self) -> None:
        if current_host().is_main:
            write_json(self.path / "environment.json", environment())

    def write_result(self, result: dict[str, Any]) -> None:
        if current_host().is_main:
            write_json(self.path / "result.json", result)

    def unfinish(self) -> None:
        """Takes result.json away, for a run that is to go on."""
        if current_host().is_main:
            (self.path / "result.json").unlink(missing_ok=True)

    def truncate_metrics(self, step: int) -> None:
        """Drops lines after `step` and a half-written last one: what a resumed run will write again."""
        path = self.path / "metrics.jsonl"
        self._unwritten = []
        if not current_host().is_main or not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        replace_text(path, "".join(line + "\n" for line in kept))

    def log(self, record: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl. On a full disk it is kept, and written with a later one or by `flush`."""
        self._unwritten.append(json.dumps(record) + "\n")
        with contextlib.suppress(DiskFull):  # the loop asks `flush` before it goes on
            self._write_lines()

    @property
    def held_back(self) -> bool:
        """Whether lines wait for space on the disk."""
        return bool(self._unwritten) and current_host().is_main

    def flush(self, *, to_disk: bool = False) -> None:
        """Writes the lines that a full disk held back; `to_disk` also makes all lines outlive a loss of power.

        Raises:
          DiskFull: there is still no space. The file holds whole lines only, and the others are kept.
        """
        self._write_lines()
        path = self.path / "metrics.jsonl"
        if to_disk and current_host().is_main and path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _write_lines(self) -> None:
        if not self._unwritten or not current_host().is_main:
            return
        path = self.path / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as file:
                file.write("".join(self._unwritten))
        except OSError as error:
            if not is_disk_full(error):
                raise
            if path.exists():
                os.truncate(path, size)
            raise DiskFull(f"{path} could not be written: no space is left on the disk") from error
        self._unwritten = []

    def _check(self, config_path: Path, experiment: Experiment) -> None:
        if not any((self.path / name).exists() for name in ("metrics.jsonl", "result.json")) and not any(
            self.checkpoints.glob("[0-9]*")
        ):
            return  # nothing was trained there: the new config takes its place
        old = from_json(read_json(config_path))
        changed = {path: values for path, values in differences(old, experiment).items() if path not in CHANGEABLE}
        if changed:
            shown = "; ".join(
                f"{path}: {before!r} there, {now!r} now" for path, (before, now) in list(changed.items())[:6]
            )
            more = f" (and {len(changed) - 6} more)" if len(changed) > 6 else ""
            raise UserError(
                f"{self.path} holds a run with another config ({shown}{more}); choose another run.directory"
            )


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, device and commit: what a run's bits depend on beside its config. Asked once a process: it runs git,
    and every checkpoint holds it."""
    import importlib.metadata

    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "chz")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "packages": versions,
        "platform": platform.platform(),
        "device_kind": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_commit": _git_commit(),
    }


def same_bits_possible(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two environments in ways that can change bits."""
    names = ("packages", "device_kind", "backend", "devices", "processes", "cpu_count", "xla_flags")
    return [name for name in names if there.get(name) != here.get(name)]


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(PROJECT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        changed = subprocess.run(
            ["git", "-C", str(PROJECT), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode:
        return None
    return found.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
