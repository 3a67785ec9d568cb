"""A child's turn on the GPU: it gets ready beside others, and is alone when it is timed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def wait(gate: Path, seconds: float) -> None:
    """Waits until the parent creates `gate`; from then on this process ends itself, whatever it is stuck in, after
    `seconds`."""
    while not gate.exists():
        if os.getppid() == 1:
            raise SystemExit("the parent ended")
        time.sleep(0.02)
    # The default action of SIGALRM ends the process in the kernel, also from inside a launch that never returns.
    signal.alarm(max(1, int(seconds)))
