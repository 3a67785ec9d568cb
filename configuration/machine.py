"""What a run finds on its machine: versions and devices, CPU cores, the folders that are kept between runs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from recollect.configuration.base import UserError

PROJECT = Path(__file__).resolve().parent.parent

_default_folder: str | None = None
"""The folder for compiled programs that this process chose by itself, if it did."""


@functools.cache
def environment() -> dict[str, Any]:
    """Returns versions, device and commit: what a run's bits depend on beside its config. Computed once per process: it
    runs git, and every checkpoint holds it."""
    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "chz")
    return {
        "python": sys.version.split()[0],
        "packages": {package: _version(package) for package in packages},
        "platform": platform.platform(),
        "device_kind": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_count": cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def cpu_count() -> int:
    """Returns how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> str:
    """Returns a short name of this machine's CPU model and features; equal names run the same code."""
    described = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        described += [line for line in lines if line.partition("\t")[0] in ("model name", "flags", "Features")]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]


def expanded(path: str | Path, said: str) -> Path:
    """Returns a path with "~" replaced; raises UserError, which begins with `said`, where it is "" or nobody's ~."""
    try:
        if path == "":
            raise RuntimeError("is empty; the current folder is .")
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{said}: {error}") from error


def cache_folder() -> Path:
    """Returns RECOLLECT_CACHE, else recollect/ in XDG_CACHE_HOME, else ~/.cache/recollect."""
    if named := os.environ.get("RECOLLECT_CACHE"):
        return expanded(named, f"RECOLLECT_CACHE={named}")
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "the cache folder") / "recollect"


def keep_compiled_programs(folder: str | None) -> Path | None:
    """Sets where jax keeps compiled programs for the next start, and returns the folder; None where it keeps none.

    To be called before the first program is compiled.

    Args:
      folder: `run.compile_cache`: a folder, "off", or None: what JAX_COMPILATION_CACHE_DIR says, else compiled/ in the
        cache folder. On a CPU that has one folder for each set of CPU features and version of jax: code compiled for
        features that a machine lacks would end its process, and machines may share a home folder.

    Raises:
      UserError: the folder cannot be made.
    """
    import jax

    global _default_folder
    before: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - unknown to type checkers
    chosen = None if folder == "off" else folder or before
    if folder is None and before in (None, _default_folder):
        name = f"cpu-{cpu_features()}-jax-{jax.__version__}" if jax.default_backend() == "cpu" else ""
        chosen = _default_folder = str(cache_folder() / "compiled" / name)
    if chosen is not None and "://" not in chosen:
        chosen = str(expanded(chosen, f"run.compile_cache={chosen}"))
        try:
            Path(chosen).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.compile_cache={chosen}: the folder cannot be made ({error.strerror})") from error
    if chosen != before:
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", chosen)
        compilation_cache.reset_cache()  # jax looks at the folder once, at its first compilation
    if chosen is not None and chosen == _default_folder and jax.default_backend() == "cpu":
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # by jax's default only from 1 s on
    return None if chosen is None else Path(chosen)
