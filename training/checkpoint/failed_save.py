"""A save that failed in one of the processes: what it had written is deleted, and all of them say why it failed."""

from __future__ import annotations

import shutil

from recollect.configuration import UserError
from recollect.configuration.disk_full import DiskFull, is_disk_full
from recollect.configuration.io import first_line
from recollect.training.checkpoint.orbax_folder import Checkpoints
from recollect.training.distributed.host import current_host


def failure_of(checkpoints: Checkpoints, step: int | None, error: Exception | None) -> UserError:
    """Deletes what the save of `step` had written; returns the error to raise, DiskFull where a process met a full
    disk. `error` is this process's, None where another one failed."""
    host = current_host()
    full = host.largest(int(is_disk_full(error)))
    if host.is_main:
        for path in checkpoints.directory.glob(f"{step}.*"):
            shutil.rmtree(path, ignore_errors=True)
    steps = checkpoints.steps()
    kept = f"the last good one is of step {steps[-1]}" if steps else "there is none before it"
    why = "another process could not write its part" if error is None else first_line(error)
    why, kind = ("no space is left on the disk", DiskFull) if full else (why, UserError)
    return kind(f"checkpoint {checkpoints.directory / str(step)} could not be written: {why}; {kept}")
