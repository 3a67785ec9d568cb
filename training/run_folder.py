"""A run's folder: config.json, environment.json, metrics.jsonl, checkpoints/, and result.json once it is done."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from configuration import UserError, differences, from_json, to_json
from training.experiment import CHANGEABLE, Experiment

PROJECT = Path(__file__).resolve().parent.parent


class RunFolder:
    """Opens (or makes) the folder of one run.

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
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no config.json: not a run's folder, so nothing is written there")
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
        write_json(self.path / "environment.json", environment())

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.path / "result.json", result)

    def unfinish(self) -> None:
        """Takes result.json away, for a run that is to go on."""
        (self.path / "result.json").unlink(missing_ok=True)

    def truncate_metrics(self, step: int) -> None:
        """Drops lines after `step` and a half-written last one: what a resumed run will write again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        _replace(path, "".join(line + "\n" for line in kept))

    def log(self, record: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _check(self, config_path: Path, experiment: Experiment) -> None:
        if not any((self.path / name).exists() for name in ("metrics.jsonl", "result.json")) and not any(self.checkpoints.glob("[0-9]*")):
            return  # nothing was trained there: the new config takes its place
        old = from_json(read_json(config_path))
        changed = {path: values for path, values in differences(old, experiment).items() if path not in CHANGEABLE}
        if changed:
            shown = "; ".join(f"{path}: {before!r} there, {now!r} now" for path, (before, now) in list(changed.items())[:6])
            more = f" (and {len(changed) - 6} more)" if len(changed) > 6 else ""
            raise UserError(f"{self.path} holds a run with another config ({shown}{more}); choose another run.directory")


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, device and commit: what a run's bits depend on beside its config. Asked once a process: it runs git, and every
    checkpoint holds it."""
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
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_commit": _git_commit(),
    }


def same_bits_possible(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two environments in ways that can change bits."""
    names = ("packages", "device_kind", "backend", "devices", "cpu_count", "xla_flags")
    return [name for name in names if there.get(name) != here.get(name)]


def read_json(path: Path) -> Any:
    """Raises UserError when the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def write_json(path: Path, data: Any) -> None:
    """Writes a whole file or nothing."""
    _replace(Path(path), json.dumps(data, indent=2, allow_nan=True) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)


def _git_commit() -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run(["git", "-C", str(PROJECT), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode:
        return None
    return found.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
