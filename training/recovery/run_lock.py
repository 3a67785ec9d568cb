"""One process per run folder: a file `lock` in it, created exclusively, with a heartbeat.

The file names host, process and the process's start, and is written anew every 10 s. It is stale when its process is
gone (on the same host), or after 60 s without a heartbeat (from another host); a stale one is taken over. There is no
flock, which shared file systems treat differently.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.io import write_json
from recollect.training.distributed.host import current_host

HEARTBEAT = 10.0
"""Seconds between two heartbeats."""

host_name, clock, sleep = socket.gethostname, time.time, time.sleep
"""Replaced by tests."""


@contextlib.contextmanager
def locked(*folders: Path) -> Iterator[None]:
    """Keeps others from training in these run folders, which are made if need be. Of the processes of one run, the main
    one holds the locks.

    Raises:
      UserError: another process trains in one of them, or one cannot be written.
    """
    with contextlib.ExitStack() as locks:
        for folder in dict.fromkeys(folders) if current_host().is_main else ():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                locks.callback(RunLock(folder).release)
            except FileExistsError:
                raise UserError(f"{folder} is a file; a run needs a folder") from None
            except OSError as error:
                raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        yield


class RunLock:
    """Holds the lock of a run folder from its making to `release`.

    Raises:
      UserError: another process trains in the folder.
    """

    def __init__(self, folder: Path):
        self._path = folder / "lock"
        own = os.getpid()
        self._facts = {"host": host_name(), "process": own, "start": start_of(own), "id": uuid.uuid4().hex}
        while not self._create():
            from recollect.training.recovery.stale_lock import wait_until_stale

            if (holder := wait_until_stale(self._path)) is not None:
                self._remove(holder)
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Deletes the lock, unless another process has taken it over."""
        self._released.set()
        self._remove(self._facts)

    def _create(self) -> bool:
        try:
            with self._path.open("x") as file:
                json.dump({**self._facts, "heartbeat": clock()}, file)
        except FileExistsError:
            return False
        except OSError:  # a full disk
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _remove(self, holder: dict[str, Any]) -> None:
        """Deletes the lock if it is still `holder`'s: of several that find it stale, one may have taken it over."""
        aside = self._path.with_name(f"lock-{self._facts['id']}")
        with contextlib.suppress(OSError):
            os.rename(self._path, aside)  # one process alone succeeds
            moved = read(aside)
            if moved is not None and moved.get("id") != holder.get("id"):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)
            aside.unlink()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            holder = read(self._path)
            if holder is None or holder.get("id") != self._facts["id"]:
                continue  # this process was suspended for so long that another one took over
            with contextlib.suppress(OSError, UserError):  # a full disk: the next one may succeed
                write_json(self._path, {**self._facts, "heartbeat": clock()})


def read(path: Path) -> dict[str, Any] | None:
    """Returns what a lock holds; None: there is no such file. One that cannot be read (it is being written) beats when
    it was last changed."""
    try:
        text, changed = path.read_text(errors="replace"), path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        facts = json.loads(text)
        return {**facts, "heartbeat": float(facts["heartbeat"])}
    except (ValueError, TypeError, KeyError):
        return {"heartbeat": changed}


def start_of(process: Any) -> str | None:
    """Returns when a process of this host started, which tells it from a later one of its number; None: it is gone."""
    if not isinstance(process, int):
        return None
    if not Path("/proc/self/stat").exists():
        from recollect.training.recovery.stale_lock import is_running

        return "running" if is_running(process) else None
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
