"""Sizes that cannot be are refused before anything is allocated."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax

from recollect.configuration import UserError
from recollect.models.functional import FunctionalModel, count


def check_size(model: FunctionalModel, tokens: int, members: int = 1) -> None:
    """Checks the least that training takes: parameters with their gradients, and one activation of a batch.

    Args:
      tokens: of a batch, or of one part of it.
      members: models trained at once.

    Raises:
      UserError: that exceeds the memory.
    """
    parameters = count(model.abstract_params()) * members
    width, many = model.config.width, tokens * members
    check_memory(2 * 4 * parameters, f"model.width={width}: {parameters:,} parameters and their gradients")
    check_memory(4 * many * width, f"one activation of {many:,} tokens")


def check_memory(needed: int, what: str) -> None:
    """Checks that `needed` bytes, a lower bound, fit the memory of this process's devices taken together.

    Raises:
      UserError: they do not; `what` takes them.
    """
    present = device_memory()
    if present is not None and needed > present:
        raise UserError(f"{what} would take at least {_text(needed)} of memory, and there are {_text(present)} here")


def device_memory() -> int | None:
    """Returns the bytes of memory of the local devices (a CPU's: of the machine or control group); None if unknown."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        return None if None in limits else sum(limits)  # type: ignore[arg-type]
    sizes = []
    with contextlib.suppress(ValueError, OSError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):  # "max" is no number
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes, default=None)


def _text(size: float) -> str:
    """Returns a number of bytes for people: "23.4 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} PB"
