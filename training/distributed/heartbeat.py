"""Watching the other processes of a run: one that dies ends the rest with one clear line, never with a hang.

Four things can tell that a process is gone, and whichever is first counts. Every process counts up a beat of its own in
the key-value store of jax's coordination service (it lives in process 0) and reads the others'; a process that ends
with an error leaves a note there; collectives fail in the main thread (Gloo at once, others hang); and jax's runtime
has heartbeats of its own, upon which it aborts the process from a thread of C++. The abort is caught by a handler of
SIGABRT, because jax offers no working callback (jaxlib 0.10.2 ends in `std::bad_cast` when it is given one).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

PEER_LOST = 75
"""Exit code of a process that ends because another one is gone or never came (EX_TEMPFAIL: the same command may be
tried again)."""

ROOT = "recollect"
"""Where this project's keys begin in the store."""
_GRACE = 3.0
"""Seconds that process 0 stays after an error so that others read its note, and that a process's own error may take
to come up."""


class Watch(threading.Thread):
    """Watches the peers of this process from a thread.

    Args:
      client: of jax's coordination service; None until this process has joined.
      address: HOST:PORT of process 0.
      count, index: processes, and which one this is.
      timeout: seconds of silence after which a process counts as dead.
    """

    def __init__(self, address: str, count: int, index: int, timeout: float):
        super().__init__(name="recollect-peers", daemon=True)
        self.client: Any = None
        self.address, self.count, self.index, self.timeout = address, count, index, timeout
        # A store of one key a process: kept to some fifty reads and writes a second however many there are.
        self.interval = max(min(1.0, timeout / 10), count / 50)
        self.hosts: dict[int, str] = {}
        self._seen: dict[int, tuple[str, float]] = {}
        self._notes: dict[int, dict[str, Any]] = {}
        self._answered = time.monotonic()
        self._done = threading.Event()
        self._ending = threading.Lock()
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)  # kept: C holds a bare pointer to it
        if sys.platform != "win32":
            ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), self._handler)

    def joined(self, client: Any) -> None:
        """Starts watching, over `client`."""
        self.client = client
        now = time.monotonic()
        self._answered = now
        self._seen = {index: ("", now) for index in range(self.count) if index != self.index}
        self.start()

    def close(self) -> None:
        """Ends watching: the run is over, and processes may go."""
        self._done.set()
        if sys.platform != "win32":
            ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), ctypes.c_void_p(0))
        if self.is_alive():
            self.join(timeout=5)

    def run(self) -> None:
        beat = 0
        while not self._done.wait(self.interval):
            beat += 1
            try:
                self._look(str(beat))
            except Exception:  # the store does not answer: that is what is being watched
                if time.monotonic() - self._answered > self.timeout and not self._done.is_set():
                    self.end(0, self._silent(0))
                continue
            if self._done.is_set():
                return
            lost = self._lost(self.timeout)
            if lost is not None:
                if lost[0] in self._notes:
                    time.sleep(_GRACE)  # this process's own error may say more
                self.end(*lost)

    def _look(self, beat: str) -> None:
        self.client.key_value_set(f"{ROOT}/beat/{self.index}", beat, allow_overwrite=True)
        rows = {int(key.rpartition("/")[2]): value for key, value in self.client.key_value_dir_get(f"{ROOT}/beat")}
        notes = {
            int(key.rpartition("/")[2]): json.loads(value)
            for key, value in self.client.key_value_dir_get(f"{ROOT}/note")
        }
        now = self._answered = time.monotonic()
        self._notes = {index: note for index, note in notes.items() if index != self.index}
        for index, value in rows.items():
            if index in self._seen and self._seen[index][0] != value:
                self._seen[index] = (value, now)

    def _lost(self, silence: float) -> tuple[int, str] | None:
        """Who is gone and why: from the notes of others first, else a process silent for `silence` seconds."""
        for note in self._notes.values():
            return note["who"], note["why"]
        now = time.monotonic()
        if now - self._answered > silence:
            return 0, self._silent(0)
        late = [index for index, (_, when) in self._seen.items() if now - when > silence]
        return (late[0], self._silent(late[0])) if late else None

    def _silent(self, index: int) -> str:
        when = self._answered if index == 0 and self.index != 0 else self._seen.get(index, ("", self._answered))[1]
        return f"{self.name_of(index)} stopped answering (last heard of {time.monotonic() - when:.0f} s ago)"

    def name_of(self, index: int) -> str:
        """`process 1 of 4 (host-b)`."""
        host = f" ({self.hosts[index]})" if index in self.hosts else ""
        return f"process {index} of {self.count}{host}"

    def failed(self, error: BaseException) -> None:
        """Ends this process after a failed operation across processes: names the process that is gone, once that is
        known."""
        deadline = time.monotonic() + self.timeout
        lost = None
        while lost is None and time.monotonic() < deadline:
            time.sleep(self.interval / 2)
            lost = self._lost(5 * self.interval)
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        self.end(
            *(lost or (self.index, f"an operation across processes failed in {self.name_of(self.index)}: {first}"))
        )

    def leave(self, why: str) -> None:
        """Tells the others that this process ends with an error, so that they need not wait for its silence."""
        self._done.set()
        self._note(self.index, f"{self.name_of(self.index)} ended: {why}")

    def _note(self, who: int, why: str) -> None:
        try:
            self.client.key_value_set(
                f"{ROOT}/note/{self.index}", json.dumps({"who": who, "why": why}), allow_overwrite=True
            )
        except Exception:  # nobody is left to be told
            return
        if self.index == 0:
            time.sleep(_GRACE + 2 * self.interval)

    def end(self, who: int, why: str) -> None:
        """Prints why this process ends, tells the others, and ends it with exit code 75."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # another thread is about to end this process
        self._say(why)
        self._note(who, why)
        os._exit(PEER_LOST)

    def _say(self, why: str) -> None:
        again = (
            f"start all {self.count} processes again with the same command: the run goes on from its last checkpoint"
        )
        sys.stdout.flush()
        os.write(2, f"error: {why}; process {self.index} stops too; {again}\n".encode())

    def _aborted(self, _: int) -> None:
        """Called in place of the process's end by abort(); runs on whatever thread aborted."""
        if self._ending.acquire(blocking=False):
            if self.client is None:
                os.write(2, f"error: {self._not_joined()}\n".encode())
            else:
                lost = self._lost(3 * self.interval)
                if self.index != 0 and not self._reachable():
                    lost = 0, f"{self.name_of(0)}, the coordinator at {self.address}, stopped answering"
                self._say(lost[1] if lost else "another process stopped answering (jax's runtime says which above)")
        os._exit(PEER_LOST)

    def _not_joined(self) -> str:
        if self.index != 0 and not self._reachable():
            return f"process {self.index} of {self.count}: no coordinator answers at {self.address}; is process 0 started there?"
        return (
            f"process {self.index} of {self.count}: not all {self.count} processes joined at {self.address} in time; each needs the same "
            "--coordinator and --processes, and a --process of its own from 0"
        )

    def _reachable(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            return False
        return True
