"""How the program was started, and Ctrl-C while it starts and ends: imported before anything that takes time.

In the midst of an import KeyboardInterrupt breaks what is being initialised, in a callback it is swallowed, and outside
of a command nobody says "stopped". Where the process is this program, Ctrl-C therefore waits until a command runs.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from types import FrameType

MAIN = os.path.realpath(os.path.join(os.path.dirname(__file__), "main.py"))
CONSOLE = os.path.realpath(os.path.join(os.path.dirname(__file__), "configuration", "console.py"))
IN_CHECKOUT = os.path.realpath(sys.argv[0]) == MAIN
PROGRAM = "python main.py" if IN_CHECKOUT else "recollect"
"""The command by which the program was started, for messages that name another of its commands."""

AGAIN = 0.05
"""Seconds after which an interrupt that had to wait is tried again."""

_NOT_NOW = ("_xla_gc_callback", "__del__")
"""Functions whose exceptions are swallowed."""


def command_can_stop(frame: FrameType | None) -> bool:
    """Returns whether KeyboardInterrupt raised at `frame` reaches `exit_code` of console.py, and breaks no import."""
    interrupted = frame
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith("<frozen importlib") or name in _NOT_NOW:
            return False
        if name == "exit_code" and os.path.realpath(file) == CONSOLE:
            return frame is not interrupted  # at its first instruction its `try` has not begun
        frame = frame.f_back
    return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, at once or later; at a second Ctrl-C also in the midst of an import."""
    _asked.append(number)
    if command_can_stop(frame) or _asked.count(signal.SIGINT) > 1:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _asked.clear()
        raise KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, AGAIN)


_asked: list[int] = []


def _end() -> None:
    """From here on there is nothing to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


if IN_CHECKOUT or os.path.basename(sys.argv[0]) == "recollect":
    _processes = sys.modules.get("multiprocessing.process")  # which a child of multiprocessing has imported
    _is_child = _processes is not None and _processes.parent_process() is not None
    if not _is_child and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)
        atexit.register(_end)
