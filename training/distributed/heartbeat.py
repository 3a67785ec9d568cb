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
import itertools
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from recollect.configuration.io import first_line
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
        self._beats: dict[int, str] = {}
        self._notes: list[str] = []
        self._done = threading.Event()
        self._ending = threading.Lock()
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)  # kept: C holds a bare pointer to it
        ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), self._handler)

    def begin(self, client: Any, hosts: list[str]) -> None:
        """Starts watching over `client`, of jax's coordination service; `hosts` are the processes' host names."""
        self._answered = time.monotonic()
        self._heard = dict.fromkeys(set(range(self.place.processes)) - {self.place.index}, self._answered)
        self._client, self._hosts = client, hosts
        self.start()

    def close(self) -> None:
        """Ends watching: the run is over, and processes may go."""
        self._done.set()
        ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), ctypes.c_void_p(0))
        self.join(timeout=5)

    def run(self) -> None:
        for beat in itertools.count(1):
            if self._done.wait(self.interval):
                return
            with contextlib.suppress(Exception):  # the store does not answer: `_lost` sees that once it has lasted
                self._exchange(str(beat))
            reason = self._lost(self.timeout)
            if reason is not None and not self._done.is_set():
                if self._notes:
                    time.sleep(_GRACE)  # this process's own error may say more
                self._end(PEER_LOST, self._line(reason), reason)

    def name_of(self, index: int) -> str:
        """Returns `process 1 of 4 (host-b)`."""
        return f"process {index} of {self.place.processes}" + (f" ({self._hosts[index]})" if self._hosts else "")

    def failed(self, error: BaseException) -> NoReturn:
        """Ends this process after a failed operation across processes; names the one that is gone, once that shows."""
        deadline = time.monotonic() + self.timeout
        while (reason := self._lost(5 * self.interval)) is None and time.monotonic() < deadline:
            time.sleep(self.interval / 2)
        here = self.name_of(self.place.index)
        reason = reason or f"an operation across processes failed in {here}: {first_line(error)}"
        self._end(PEER_LOST, self._line(reason), reason)

    def leave(self, code: int, why: str, line: str = "") -> NoReturn:
        """Ends this process with `code` after printing `line`; the others learn `why` and need not wait for silence."""
        self._end(code, line, f"{self.name_of(self.place.index)} ended: {why[:500]}")

    def _exchange(self, beat: str) -> None:
        self._client.key_value_set(f"{ROOT}/beat/{self.place.index}", beat, allow_overwrite=True)
        beats, notes = (
            {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(f"{ROOT}/{name}")}
            for name in ("beat", "note")
        )
        self._answered = time.monotonic()
        self._notes = [note for index, note in notes.items() if index != self.place.index]
        for index in self._heard:
            if beats.get(index) != self._beats.get(index):
                self._heard[index] = self._answered
        self._beats = beats

    def _lost(self, silence: float) -> str | None:
        """Returns which process is gone and why: from others' notes first, else one silent for `silence` seconds."""
        if self._notes:
            return self._notes[0]
        now = time.monotonic()
        # While the store, in process 0, does not answer, no other process can be heard.
        heard = self._heard if now - self._answered <= silence else {0: self._answered}
        at, index = min((at, index) for index, at in heard.items())
        if now - at <= silence:
            return None
        return f"{self.name_of(index)} stopped answering (last heard of {now - at:.0f} s ago)"

    def _line(self, reason: str) -> str:
        return (
            f"error: {reason}; process {self.place.index} stops too; start all {self.place.processes} processes again "
            "with the same command: the run goes on from its last checkpoint"
        )

    def _end(self, code: int, line: str, note: str) -> NoReturn:
        """Prints why this process ends, leaves a note of it to the others, and ends it."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # another thread is about to end this process
        _print(line)
        with contextlib.suppress(Exception):  # nobody is left to read it
            self._client.key_value_set(f"{ROOT}/note/{self.place.index}", note, allow_overwrite=True)
            if self.place.index == 0:
                time.sleep(_GRACE + 2 * self.interval)
        os._exit(code)

    def _aborted(self, _: int) -> None:
        """Called in place of the process's end by abort(); runs on whatever thread aborted."""
        if self._ending.acquire(blocking=False):
            here, coordinator = self.name_of(self.place.index), self.place.coordinator
            answers = self.place.index == 0 or self._coordinator_answers()
            if self._client is not None and answers:
                lost = self._lost(3 * self.interval)
                line = self._line(lost or "another process stopped answering (jax's runtime says which)")
            elif self._client is not None:
                line = self._line(f"{self.name_of(0)}, the coordinator at {coordinator}, stopped answering")
            elif answers:
                line = (
                    f"error: {here}: not all {self.place.processes} processes joined at {coordinator} in time; "
                    "each needs the same --coordinator and --processes, and a --process of its own from 0"
                )
            else:
                line = f"error: {here}: no coordinator answers at {coordinator}; is process 0 started there?"
            _print(line)
        os._exit(PEER_LOST)

    def _coordinator_answers(self) -> bool:
        host, _, port = self.place.coordinator.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return True
        return False


def _print(line: str) -> None:
    """Writes to stderr past Python's buffers, which another thread may hold."""
    sys.stdout.flush()
    if line:
        os.write(2, f"{line}\n".encode())
