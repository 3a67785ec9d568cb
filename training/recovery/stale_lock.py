"""A run folder's lock that is there already: whether its process is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.training.recovery import run_lock

STALE_AFTER = 60.0
"""Seconds without a heartbeat until another host's lock is stale."""


def wait_until_stale(path: Path) -> dict[str, Any] | None:
    """Returns what a stale lock holds; None where it was released.

    Raises:
      UserError: its process lives.
    """
    while (holder := run_lock.read(path)) is not None and not _is_stale(holder):
        silence = run_lock.clock() - holder["heartbeat"]
        if holder.get("host") == run_lock.host_name() or silence <= 2 * run_lock.HEARTBEAT:
            who = f"process {holder.get('process', '?')} on {holder.get('host', 'another host')}"
            raise UserError(
                f"{path.parent} is in use by {who}: one process trains in a run folder at a time; wait for it, stop "
                "it, or choose another folder"
            )
        run_lock.sleep(1.0)  # it may be gone: a moment will tell
    return holder


def is_running(process: int) -> bool:
    """Returns whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's
    return True


def _is_stale(holder: dict[str, Any]) -> bool:
    if holder.get("host") == run_lock.host_name():
        return run_lock.start_of(holder.get("process")) != holder.get("start")
    return run_lock.clock() - holder["heartbeat"] > STALE_AFTER
