"""The file of results: one JSON line per event, on disk before anything else happens.

The parent and all its children append to one file. A line is one write of less than 4 KiB to a file opened for
appending, and is synced before `write` returns, so a child that hangs, aborts or is killed loses nothing that it had
written. `started` is written before each launch: the last one without a result names what hung.
"""

import json
import os
import time
from pathlib import Path

FILE = "first_contact.jsonl"
FILE_VARIABLE, STEP_VARIABLE = "FIRST_CONTACT_FILE", "FIRST_CONTACT_STEP"
"""The environment variables by which a child knows the file and its own step."""
REHEARSAL_VARIABLE = "FIRST_CONTACT_REHEARSAL"
FAULT_VARIABLE = "FIRST_CONTACT_FAULT"
"""In a rehearsal, what a child does at its first launch: "hang" or "abort"."""


def rehearsing() -> bool:
    """Returns whether kernels are to be simulated, at tiny sizes, on a machine without a GPU."""
    return bool(os.environ.get(REHEARSAL_VARIABLE))


def write(kind: str, *, path: Path | None = None, step: str | None = None, **facts) -> None:
    """Appends one line and syncs it: {"kind", "step", "at" (Unix seconds), ...facts}.

    Args:
      path: of the file; step: whose line it is. None is what the parent named to this child.
    """
    step = os.environ.get(STEP_VARIABLE, "") if step is None else step
    line = json.dumps({"kind": kind, "step": step, "at": round(time.time(), 3), **facts}, default=str)
    with open(path or os.environ[FILE_VARIABLE], "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())
        os.fsync(file)


def read(path: Path) -> list[dict]:
    """Returns the lines of the file, in order; a line cut off by a full disk or a crash, or of another kind of file,
    is left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            facts = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(facts, dict) and "kind" in facts and "step" in facts:
            lines.append(facts)
    return lines


def read_call(path: Path) -> list[dict]:
    """Returns the lines of the call that began last: several calls may share a folder, and what ended in one runs
    anew in the next."""
    lines = read(path)
    return lines[max((index for index, line in enumerate(lines) if line["kind"] == "begun"), default=0) :]


def dead(lines: list[dict]) -> set[str]:
    """Returns the timings of families whose check ended by a signal that the parent did not send: a launch that
    aborts would do so again."""
    ends = (line for line in lines if line["kind"] == "ended" and (line["code"] or 0) < 0 and not line.get("why"))
    return {line["step"].replace("check: ", "time: ") for line in ends if line["step"].startswith("check: ")}
