"""Children with deadlines: each in a session of its own, killed with all it started, its end recorded.

In a session of its own a child does not hear what ends the parent, so the parent ends it: see `listen` and `end_all`.
"""

import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from recollect.benchmarks.first_contact import records

TAIL = 1500  # characters of a child's output kept with an end that was not a success
_ALIVE: list["Child"] = []
_HEARD: list[int] = []


class Interrupted(Exception):
    """A signal asked this process to end; its argument is which."""


def listen() -> None:
    """From now on SIGINT and SIGTERM raise Interrupted where a child is next started or looked at, never in between."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: _HEARD.append(number))


def end_all(why: str) -> None:
    """Kills every child that runs and all that it started, and records their ends."""
    for child in tuple(_ALIVE):
        child.kill(why)


def plain(name: str) -> str:
    """Returns a step's name as a file has it: letters, digits and hyphens."""
    return re.sub(r"[\W_]", "-", name)


def _raise_if_interrupted() -> None:
    if _HEARD:
        raise Interrupted(signal.Signals(_HEARD[0]))


Step = collections.namedtuple("Step", ["name", "command", "seconds", "environment", "gate"], defaults=[{}, None])
"""A child to run. name: in the records. command: its arguments. seconds: its deadline from its start. environment:
variables beside the parent's. gate: the file that lets it begin what needs the GPU alone, where there is one; it
records "ready" before it waits for that."""


class Child:
    """A running step.

    Args:
      step: what to run.
      folder: where its output goes, NAME.log.
      file: the file of records.
    """

    def __init__(self, step: Step, folder: Path, file: Path):
        _raise_if_interrupted()
        self.step, self.file, self.begun = step, file, time.monotonic()
        self.log = folder / f"{plain(step.name)}.log"
        known = {records.FILE_VARIABLE: str(file), records.STEP_VARIABLE: step.name}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                step.command
                if shutil.which(step.command[0])
                else ["sh", "-c", f"echo no {step.command[0]} here; exit 127"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **known, **step.environment},
                start_new_session=True,
            )
        _ALIVE.append(self)

    def running(self) -> bool:
        """Returns whether it runs still; a child past its deadline is killed, and an end is recorded once.

        Raises:
          Interrupted: by a signal that `listen` heard.
        """
        _raise_if_interrupted()
        if self in _ALIVE and self.process.poll() is not None:
            self.kill("")
        if self in _ALIVE and time.monotonic() - self.begun > self.step.seconds:
            self.kill("deadline")
        return self in _ALIVE

    def kill(self, why: str) -> None:
        """Ends the child, if it runs still, and all that it started, and records its end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        _ALIVE.remove(self)
        facts = {"code": code, "seconds": round(time.monotonic() - self.begun, 1)}
        if code:
            facts |= {"signal": signal.Signals(-code).name if code < 0 else "", "why": why}
            facts["tail"] = self.log.read_text(errors="replace")[-TAIL:]
        records.write("ended", path=self.file, step=self.step.name, **facts)


class Group:
    """Steps of which at most `at_once` run at a time, in order."""

    def __init__(self, steps: list[Step], at_once: int, folder: Path, file: Path):
        self.waiting, self.at_once, self.folder, self.file = list(steps), at_once, folder, file
        self.children: list[Child] = []

    def advance(self) -> bool:
        """Starts what may start; returns whether anything is left."""
        running = sum(child.running() for child in self.children)
        while self.waiting and running < self.at_once:
            self.children.append(Child(self.waiting.pop(0), self.folder, self.file))
            running += 1
        return bool(running)

    def stop(self, why: str) -> None:
        """Kills what runs and records what was never started."""
        for child in self.children:
            if child.running():
                child.kill(why)
        for step in self.waiting:
            records.write("ended", path=self.file, step=step.name, code=None, why=f"not started: {why}")
        self.waiting = []

    def ready(self, end: float) -> None:
        """Waits until every step that runs is ready for its turn, or until `end` (time.monotonic): what compiles
        beside a timing would be in it."""
        while self.advance() and time.monotonic() < end:
            ready = {line["step"] for line in records.read_call(self.file) if line["kind"] == "ready"}
            if not self.waiting and all(x.step.name in ready for x in self.children if x.running()):
                return
            time.sleep(0.1)

    def take(self, end: float, seconds: float) -> None:
        """Opens the gates of steps that get ready beside each other, one after another, first of those that are ready,
        until `end` (time.monotonic): they have the GPU one at a time, each for `seconds` at most."""
        while self.advance() and time.monotonic() < end:
            lines = records.read_call(self.file)
            for child in self.children:
                if child.running() and child.step.name in records.dead(lines):
                    child.kill("the family's check died")
            ready = {line["step"] for line in lines if line["kind"] == "ready"}
            child = next((child for child in self.children if child.running() and child.step.name in ready), None)
            if child is None:
                time.sleep(0.1)
                continue
            child.step.gate.touch()
            last = min(time.monotonic() + seconds, end)
            while child.running():
                if time.monotonic() > last:
                    child.kill("its turn was over")
                time.sleep(0.02)
        self.stop("no time was left")
