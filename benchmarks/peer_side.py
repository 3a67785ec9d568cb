"""The peer's side of `peer_process.PeerProcess`: answers JSON lines.

Imports the standard library alone, so that it runs under the interpreter of any peer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any


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
