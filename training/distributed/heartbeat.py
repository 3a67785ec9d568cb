"""Ends a process of a run with one clear line when another one is gone; without this it would hang or abort.

jax ends all processes of a run when one dies, but does not name it, exits with SIGABRT, and where heartbeats alone show
the death it names no reason. Here every process counts up a beat in the key-value store of jax's coordination service
(it lives in process 0) and reads the others', and one that ends with an error leaves a note there. Whichever shows
first counts: a note, a silent beat, a collective that fails in the main thread (Gloo's do at once, others hang), or
jax's own heartbeats, upon which its runtime calls abort() from a thread of C++. The abort is caught by a handler of
SIGABRT in C: Python's handlers run too late, and jaxlib 0.10.2 ends in `std::bad_cast` when it is given a callback.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from recollect.training.distributed.cluster import Place

PEER_LOST = 75
"""Exit code of a process that ends because another one is gone or never came (EX_TEMPFAIL: the same command may be
tried again)."""

ROOT = "recollect"
"""Where this project's keys begin in the store."""
_GRACE = 3.0
"""Seconds that process 0 stays after an error so that others read its note, and that a process's own error may take
to come up."""


class Watch(threading.Thread):
    """Watches the other processes of a run from a thread, once `begin` was called.

    Args:
      place: where this process stands.
      timeout: seconds of silence after which a process counts as dead.
    """

    def __init__(self, place: Place, timeout: float):
        super().__init__(name="recollect-peers", daemon=True)
        self.place, self.timeout = place, timeout
        # One key per process: some fifty reads and writes per second however many there are.
        self.interval = max(min(1.0, timeout / 10), place.processes / 50)
        self._client: Any = None
        self._hosts: list[str] = []
        self._seen: dict[int, tuple[str, float]] = {}
        self._notes: list[str] = []
        self._answered = time.monotonic()
        self._done = threading.Event()
        self._ending = threading.Lock()
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)  # kept: C holds a bare pointer to it
        ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), self._handler)

    def begin(self, client: Any, hosts: list[str]) -> None:
        """Starts watching over `client`, of jax's coordination service; `hosts` are the processes' host names."""
        self._client, self._hosts = client, hosts
        self._answered = time.monotonic()
        others = set(range(self.place.processes)) - {self.place.index}
        self._seen = dict.fromkeys(others, ("", self._answered))
        self.start()

    def close(self) -> None:
        """Ends watching: the run is over, and processes may go."""
        self._done.set()
        ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), ctypes.c_void_p(0))
        self.join(timeout=5)

    def run(self) -> None:
        beat = 0
        while not self._done.wait(self.interval):
            beat += 1
            with contextlib.suppress(Exception):  # the store does not answer: `_lost` sees that once it has lasted
                self._exchange(str(beat))
            reason = self._lost(self.timeout)
            if reason is not None and not self._done.is_set():
                if self._notes:
                    time.sleep(_GRACE)  # this process's own error may say more
                self._end(reason)

    def name_of(self, index: int) -> str:
        """Returns `process 1 of 4 (host-b)`."""
        host = f" ({self._hosts[index]})" if self._hosts else ""
        return f"process {index} of {self.place.processes}{host}"

    def failed(self, error: BaseException) -> NoReturn:
        """Ends this process after a failed operation across processes; names the one that is gone, once that shows."""
        deadline = time.monotonic() + self.timeout
        reason = None
        while reason is None and time.monotonic() < deadline:
            time.sleep(self.interval / 2)
            reason = self._lost(5 * self.interval)
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        self._end(reason or f"an operation across processes failed in {self.name_of(self.place.index)}: {line}")

    def leave(self, code: int, why: str, line: str = "") -> NoReturn:
        """Ends this process with `code` after printing `line`; the others learn `why` and need not wait for silence."""
        self._done.set()
        _print(line)
        self._note(f"{self.name_of(self.place.index)} ended: {why[:500]}")
        os._exit(code)

    def _exchange(self, beat: str) -> None:
        self._client.key_value_set(f"{ROOT}/beat/{self.place.index}", beat, allow_overwrite=True)
        beats, notes = (
            {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(f"{ROOT}/{name}")}
            for name in ("beat", "note")
        )
        self._answered = time.monotonic()
        self._notes = [json.loads(note) for index, note in notes.items() if index != self.place.index]
        for index, (last, _) in self._seen.items():
            if beats.get(index, last) != last:
                self._seen[index] = (beats[index], self._answered)

    def _lost(self, silence: float) -> str | None:
        """Returns which process is gone and why: from others' notes first, else one silent for `silence` seconds."""
        if self._notes:
            return self._notes[0]
        now = time.monotonic()
        heard = {0: self._answered} if now - self._answered > silence else {i: at for i, (_, at) in self._seen.items()}
        late = [index for index, at in heard.items() if now - at > silence]
        return (
            f"{self.name_of(late[0])} stopped answering (last heard of {now - heard[late[0]]:.0f} s ago)"
            if late
            else None
        )

    def _note(self, why: str) -> None:
        try:
            self._client.key_value_set(f"{ROOT}/note/{self.place.index}", json.dumps(why), allow_overwrite=True)
        except Exception:  # nobody is left to read it
            return
        if self.place.index == 0:
            time.sleep(_GRACE + 2 * self.interval)

    def _end(self, reason: str) -> NoReturn:
        """Prints why this process ends, leaves it to the others, and ends it with exit code 75."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # another thread is about to end this process
        _print(self._line(reason))
        self._note(reason)
        os._exit(PEER_LOST)

    def _line(self, reason: str) -> str:
        return (
            f"error: {reason}; process {self.place.index} stops too; start all {self.place.processes} processes again "
            "with the same command: the run goes on from its last checkpoint"
        )

    def _aborted(self, _: int) -> None:
        """Called in place of the process's end by abort(); runs on whatever thread aborted."""
        if self._ending.acquire(blocking=False):
            here, coordinator = self.place.index, self.place.coordinator
            reachable = here == 0 or self._reachable()
            if self._client is not None:
                reason = self._lost(3 * self.interval) or "another process stopped answering (jax's runtime says which)"
                if not reachable:
                    reason = f"{self.name_of(0)}, the coordinator at {coordinator}, stopped answering"
                line = self._line(reason)
            elif reachable:
                line = (
                    f"error: {self.name_of(here)}: not all {self.place.processes} processes joined at {coordinator} in "
                    "time; each needs the same --coordinator and --processes, and a --process of its own from 0"
                )
            else:
                line = (
                    f"error: {self.name_of(here)}: no coordinator answers at {coordinator}; is process 0 started there?"
                )
            _print(line)
        os._exit(PEER_LOST)

    def _reachable(self) -> bool:
        host, _, port = self.place.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            return False
        return True


def _print(line: str) -> None:
    """Writes to stderr past Python's buffers, which another thread may hold."""
    sys.stdout.flush()
    if line:
        os.write(2, f"{line}\n".encode())
