"""kernel_peers.py in a process of its own, which may hang or die: its cases then have rows that say so, and the next
case gets a new process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from typing import IO, Any

from recollect.benchmarks.reporting import REPOSITORY
from recollect.configuration import UserError


class Peers:
    """Answers of the peers, one case after another.

    Args:
      python: an interpreter with torch and flash-linear-attention.
      seconds: that one case may take, compiling and tuning included.

    Raises:
      UserError: the interpreter does not start.
    """

    def __init__(self, python: str, seconds: float):
        self.python, self.seconds = python, seconds
        self._start()

    def measure(self, case: Any) -> dict[str, Any]:
        """Its times for this case, or {"error"} with the reason there are none."""
        if self.process.poll() is not None:
            self._start()
        assert self.process.stdin is not None
        answer = None
        try:
            self.process.stdin.write(json.dumps({"peer": case.peer, "sizes": case.sizes}) + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=self.seconds)
        except BrokenPipeError:
            pass
        except queue.Empty:
            self.close()
            return {"error": f"no answer in {self.seconds:g} s: killed"}
        if answer is None:
            # Its pipes close shortly before it ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            code = self.process.returncode
            self.close()
            return {"error": f"the peer's process ended: {_end(code)}"}
        if answer.pop("broken", False):
            self.close()
        return answer

    def close(self) -> None:
        """Kills the process, and those that it started to compile."""
        assert self.process.stdin is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _start(self) -> None:
        command = [self.python, str(REPOSITORY / "benchmarks" / "kernel_peers.py")]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"--peer-python {self.python!r} does not run: {error.strerror}") from error
        self.answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(self.process.stdout, self.answers), daemon=True).start()


def _pass_on(lines: IO[str], answers: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """The process's answers as they come, and None when there will be no more."""
    try:
        for line in lines:
            if line.startswith("RESULT "):
                answers.put(json.loads(line.removeprefix("RESULT ")))
    finally:
        answers.put(None)


def _end(code: int | None) -> str:
    if code is None:
        return "it reads no more cases"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
