"""Folders that are kept between runs: prepared data and compiled programs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

from recollect.configuration.base import UserError


def cache_folder() -> Path:
    """RECOLLECT_CACHE, else recollect/ in XDG_CACHE_HOME, else ~/.cache/recollect."""
    if os.environ.get("RECOLLECT_CACHE"):
        return Path(os.environ["RECOLLECT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recollect"


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

    before: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - unknown to type checkers
    chosen = None if folder == "off" else folder or before
    if folder is None and before in (None, _default_folder):
        chosen = _compiled_folder(jax.default_backend(), jax.__version__)
    if chosen is not None and "://" not in chosen:
        chosen = str(Path(chosen).expanduser())
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


_default_folder: str | None = None
"""The folder that this process chose by itself, if it did."""


def _compiled_folder(backend: str, version: str) -> str:
    global _default_folder
    name = f"cpu-{cpu_features()}-jax-{version}" if backend == "cpu" else ""
    _default_folder = str(cache_folder() / "compiled" / name)
    return _default_folder


def cpu_features() -> str:
    """Returns a short name of this machine's CPU model and features; equal names run the same code."""
    described = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        described += [line for line in lines if line.partition("\t")[0] in ("model name", "flags", "Features")]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
