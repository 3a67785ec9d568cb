"""A peer in a process of its own, under its own interpreter, which may hang or die: it then answers with the reason."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading

from recollect.benchmarks.reporting import REPOSITORY, child_environment
from recollect.configuration import UserError


class PeerProcess:
    """A script of benchmarks/ that answers requests with `peer_side.serve`.

    Args:
      option: of the command line, that named the interpreter, for the error.
      python: the interpreter.
      script: its file name, and arguments.
      seconds: that an answer may take, compiling and tuning included; None: as long as it likes.

    Raises:
      UserError: the interpreter does not start.
    """

    def __init__(self, option: str, python: str, script: list[str], seconds: float | None = None):
        self.option, self.python, self.script, self.seconds = option, python, script, seconds
        self.start()

    def start(self) -> None:
        """Starts the process, at first and when it has ended."""
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  closed with the process
        try:
            self.process = subprocess.Popen(
                [self.python, str(REPOSITORY / "benchmarks" / self.script[0]), *self.script[1:]],
                env=child_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{self.option} {self.python} cannot be run: {error.strerror}") from error
        self.answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self.process, self.answers), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def ask(self, request: dict) -> dict:
        """Returns the answer, or {"error"} with what became of the process, which is then dead."""
        answer = None
        try:
            with contextlib.suppress(OSError):  # it reads no more
                print(json.dumps(request), file=self.process.stdin, flush=True)
                answer = self.answers.get(timeout=self.seconds)
        except queue.Empty:
            self._kill()
            return {"error": f"no answer in {self.seconds:g} s: killed"}
        return {"error": f"the process ended: {self._end()}"} if answer is None else json.loads(answer)

    def close(self) -> None:
        """Ends the process, by force where it does not end by itself, and those that it started."""
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self.process.stdin.close()
            self.process.wait(1)
        self._kill()
        self.errors.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _end(self) -> str:
        """Ends the process and returns how it ended: signal or exit code, and the last line of its errors."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # its pipes close shortly before it ends
        code = self.process.poll()
        self._kill()
        if code is None:
            return "it reads no more cases"
        self.errors.seek(0)
        last = self.errors.read().strip().rsplit("\n", 1)[-1][:200]
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{end}: {last}" if last else end


def _read(process: subprocess.Popen, answers: queue.SimpleQueue) -> None:
    """Passes the answers on as they come, and None when there will be no more."""
    for line in process.stdout:
        if line.startswith("RESULT "):
            answers.put(line.removeprefix("RESULT "))
    answers.put(None)
