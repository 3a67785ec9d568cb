"""What the peer's side of `peer_process.PeerProcess` is made of: answers to JSON lines, and times of calls.

Imports the standard library alone, so that it runs under the interpreter of any peer.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

TURN = 0.01
"""Seconds of a turn: so many calls that a launch does not count."""


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]], requests: Iterable[str] | None = None) -> None:
    """Prints a line "RESULT {...}" for each request, a JSON line of standard input, until there are no more.

    Whatever `answer` raises is the answer {"error"}, not the end of the process.
    """
    for line in sys.stdin if requests is None else requests:
        try:
            result = answer(json.loads(line))
        except Exception as error:
            result = {"error": one_line(error)}
        print("RESULT " + json.dumps(result), flush=True)


def one_line(error: Exception, most: int = 200) -> str:
    """Returns type and message of an error as one line, the message of at most `most` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def timed(
    call: Callable[[], Any], wait: Callable[[Any], Any], turns: int = 20, warm_up: int = 1
) -> tuple[float, float]:
    """Returns the median seconds per call, and the spread of the turns, (longest - shortest) / median.

    Args:
      call: starts the work; wait: waits until the device has done it, given what `call` returned.
      turns: how often; each has as many calls as fill TURN seconds, at least one, and one wait at its end.
      warm_up: calls before, which compile and tune.
    """
    for _ in range(warm_up):
        wait(call())
    begun = time.perf_counter()
    wait(call())
    calls = max(1, int(TURN / max(time.perf_counter() - begun, 1e-6)))
    times = []
    for _ in range(turns):
        begun = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        times.append((time.perf_counter() - begun) / calls)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median
