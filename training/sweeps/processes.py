"""Training of a study's members in several processes at once, each on its share of this machine's CPU cores.

Members of a study are small: one alone leaves much of two cores idle. Each process trains one member after another with
the same call as without processes, in the same folders.

Easy to get wrong:
- Workers are spawned, not forked (JAX runs threads), and get their cores before JAX counts them.
- Ctrl-C must not reach them by itself: this process asks them to stop, and they save what they train.
"""

from __future__ import annotations

import collections
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from recollect.configuration import Preempted, UserError, to_json
from recollect.configuration.console import doing
from recollect.configuration.io import first_line
from recollect.training.experiment import Experiment
from recollect.training.run_state import Log


def train_in_processes(
    groups: Sequence[Sequence[Experiment]], processes: int, definitions: Sequence[Path], log: Log
) -> Iterator[tuple[Experiment, dict[str, Any], float]]:
    """Trains members in `processes` processes; yields each with its result and how many seconds it took, as it ends. To
    be called in the main thread.

    Args:
      groups: members that share a program. A process trains one group after another, so that few compile the same; with
        none left it takes members of another's.
      definitions: files of the user's that define config classes, which the processes run too.
      log: receives the lines of all runs, each with the name of its folder.

    Raises:
      UserError: a member cannot be trained, or a process was killed. The others were saved.
      Preempted, KeyboardInterrupt: SIGTERM or Ctrl-C came; members in training were saved.
    """
    waiting = collections.deque(collections.deque(group) for group in groups if group)
    workers = [_Worker(cores, definitions) for cores in _shares(min(processes, sum(map(len, groups))))]
    try:
        with _preempted_on_sigterm():
            while True:
                for worker in workers:
                    if worker.member is None and (group := _next_group(worker, workers, waiting)):
                        worker.begin(group.popleft())
                        left = sum(map(len, [*waiting, *(worker.group for worker in workers)]))
                        doing(f"training, {left} runs to come")
                if not any(worker.member for worker in workers):
                    return
                for ready in connection.wait([worker.pipe for worker in workers if worker.member]):
                    worker = next(worker for worker in workers if worker.pipe is ready)
                    kind, said = worker.receive()
                    if kind == "result":
                        member, worker.member = worker.member, None
                        yield member, said[0], said[1]
                    elif kind == "error":
                        raise UserError(f"{worker.label}: {said}")
                    else:
                        log(f"  {worker.label}: {said.strip().removeprefix(worker.label).lstrip()}")
    finally:
        for worker in workers:
            worker.process.terminate()  # one in training saves its run first
        for worker in workers:
            worker.end()


def _next_group(worker: _Worker, workers: list[_Worker], waiting: Any) -> collections.deque[Experiment]:
    """Returns the group of which a worker trains the next member; an empty one where there is none."""
    if not worker.group:
        if waiting:
            worker.group = waiting.popleft()
        else:
            return max((other.group for other in workers), key=len)
    return worker.group


def _shares(processes: int) -> list[set[int]]:
    """Returns the CPU cores of each process; empty sets where they cannot be set."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[index::processes]) for index in range(processes)]


@contextlib.contextmanager
def _preempted_on_sigterm() -> Iterator[None]:
    def handle(number: int, frame: Any) -> None:
        raise Preempted("the study was preempted, and its runs in training were saved")

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Worker:
    """One process, the pipe to it, and the member that it trains now."""

    def __init__(self, cores: set[int], definitions: Sequence[Path]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, cores, [str(path) for path in definitions])
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.member: Any = None
        self.group: collections.deque[Experiment] = collections.deque()
        self.label = ""

    def begin(self, member: Experiment) -> None:
        self.member = member
        self.label = "/".join(Path(str(member.run.directory)).parts[-2:])
        self.pipe.send(json.dumps(to_json(member)))

    def receive(self) -> tuple[str, Any]:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise UserError(
                f"the process that trained {self.label} ended with exit code {self.process.exitcode} (out of memory?); "
                "the same command goes on, with --at-once 1 in one process"
            ) from None

    def end(self) -> None:
        """Waits for the process, and reads what it still sends: it would block on a full pipe."""
        with contextlib.suppress(EOFError, OSError):
            self.pipe.send(None)  # one that noted SIGTERM in the last steps of its run would wait for another
            while True:
                self.pipe.recv()
        self.process.join()


def _work(pipe: Any, cores: set[int], definitions: list[str]) -> None:
    """Trains the members that come through `pipe`; what runs in a process of its own."""
    os.setpgrp()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process: no bars over each other
    if cores:
        os.sched_setaffinity(0, cores)
    from recollect.configuration.python_files import load_definitions
    from recollect.training.saved_experiment import experiment_from_json
    from recollect.training.train import train

    try:
        for path in definitions:
            load_definitions(Path(path))
        for text in iter(pipe.recv, None):
            member = experiment_from_json(json.loads(text), "a task of the study")
            begun = time.monotonic()
            result = train(member, lambda text: pipe.send(("log", text)))
            pipe.send(("result", (result, time.monotonic() - begun)))
    except EOFError:
        return
    except UserError as error:
        pipe.send(("error", str(error)))
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {first_line(error)}"))
