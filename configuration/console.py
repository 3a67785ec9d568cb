"""Output that cannot be written must not end a run: a closed pipe, a full device, a console without the characters."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class LastingStream:
    """A text stream that swallows what the one below it no longer takes.

    Attributes:
      failure: the error since which nothing is written; None while all is well.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.failure: OSError | None = None
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a test's stream may have no encoding
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes `text`; returns its length."""
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
def lasting_output() -> Iterator[LastingStream]:
    """Makes standard output and error outlive what they are written to; yields the former."""
    streams = LastingStream(sys.stdout), LastingStream(sys.stderr)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):  # type: ignore[type-var]
        try:
            yield streams[0]
        finally:
            for stream in streams:
                stream.flush()
