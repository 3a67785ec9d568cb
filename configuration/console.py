"""Output that outlives its pipe, its disk and its encoding; whoever waits for some is told what is being done."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from recollect.configuration.base import Preempted, UserError

SILENCE = 10.0
"""Seconds without output after which a line says what is being done."""


class NOW:
    """What is done, since when; its job: units done, in all, a function that says more; what is compiled."""

    what, since, job, program = "starting", 0.0, None, None


def doing(what: str, job: Any = None, program: Any = None) -> None:
    """Notes what the program will do ("": nothing to report), how far its job is (None: as before), what compiles."""
    NOW.since = NOW.since if what == NOW.what else time.monotonic()
    NOW.what, NOW.job, NOW.program = what, job or NOW.job, program


def exit_code(run: Callable[[], int | None]) -> int:
    """Returns the exit code of what `run` does: its own (None: 0), or after one line 2 for a user's mistake, 130 for a
    stopped run."""
    try:
        return run() or 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Preempted as preempted:
        print(f"{preempted}; the same command goes on from the last checkpoint", file=sys.stderr)
        return 0
    except KeyboardInterrupt as stopped:
        print(f"stopped; {stopped}" if stopped.args else "stopped", file=sys.stderr)
        return 130
    except OSError as error:  # a path that the system refuses: too long, without permission, on a full disk, ...
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


class LastingStream:
    """A text stream that swallows what the one below it no longer takes.

    Attributes:
      failure: the error since which nothing is written; None while all is well.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.failure: OSError | None = None
        self.written = time.monotonic()
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a test's stream may have no encoding
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes `text`; returns its length."""
        self.written = time.monotonic()
        self._try(self._stream.write, text)
        return len(text)

    def checked(self, code: int) -> int:
        """Returns an exit code: 2, after an error line, where what was written got lost; a closed pipe lost nothing."""
        self.flush()
        if self.failure is None or isinstance(self.failure, BrokenPipeError):
            return code
        print(f"error: standard output: {self.failure.strerror}", file=sys.stderr)
        return 2

    def flush(self) -> None:
        """Hands on what was written."""
        self._try(self._stream.flush)

    def _try(self, function: Any, *arguments: Any) -> None:
        if self.failure is not None:
            return
        try:
            function(*arguments)
        except OSError as error:
            self.failure = error
            with contextlib.suppress(OSError, ValueError):  # what is still buffered would fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output(what: str = "starting") -> Iterator[LastingStream]:
    """Makes standard output and error outlive what they are written to, and shows what is being done, at first `what`;
    yields standard output."""
    streams, ended = (LastingStream(sys.stdout), LastingStream(sys.stderr)), threading.Event()
    watch = threading.Thread(target=_watch, args=(what, *streams, ended), daemon=True)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):  # type: ignore[type-var]
        try:
            watch.start()
            yield streams[0]
        finally:
            ended.set()
            watch.join()
            for stream in streams:
                stream.flush()


def _watch(what: str, output: LastingStream, errors: LastingStream, ended: threading.Event) -> None:
    """Shows what is being done until the program has `ended`."""
    NOW.what, NOW.since, NOW.job, NOW.program = what, time.monotonic(), None, None
    if errors.isatty():
        from recollect.configuration.terminal import draw_until

        return draw_until(ended, output, errors)
    while not ended.wait(1.0):
        if NOW.what and time.monotonic() - max(output.written, errors.written) > SILENCE:
            from recollect.configuration.waiting import waiting_line

            print(waiting_line(), file=errors, flush=True)
