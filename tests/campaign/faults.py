"""Seeded faults, each done to a run that is started again until it has ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from recollect.data.synthetics import MQAR
from recollect.data.text.rows.by_number import GlobalBatches
from recollect.main import main
from recollect.training.checkpoint.orbax_folder import Checkpoints
from recollect.training.recovery.replay import replay
from recollect.training.run_folder import RunFolder
from tests.campaign.runs import Process, experiment_of, lost, remains

KINDS = (
    "kill",
    "kill in a save",
    "flipped file",
    "truncated file",
    "missing file",
    "SIGTERM",
    "full disk, stop",
    "full disk, continue",
    "NaN batch and kill",
    "all checkpoints damaged",
    "NaN batches in a row",
    "second process",
    "console that cannot print",
    "closed pipe",
    "moved data folder",
    "full disk in prepare",
)
SHARES = (12, 12, 6, 6, 6, 6, 3, 3, 4, 1, 1, 2, 2, 2, 2, 2)
"""Of 70 faults, how many are of each kind."""

NAN_AT = {"recall": 33, "text": 19}
"""Steps (from 0) whose batches hold NaN where a fault asks for that."""

_TOLD = re.compile(r"error:|damaged|cut off|resumed|skipped|stopped:|going on|preempted|SIGTERM")


@dataclasses.dataclass
class Outcome:
    """One line of the table; `lost` is empty when nothing was lost."""

    fault: str
    run: str
    moment: str
    said: str
    lost: str


class Course:
    """One fault from the first start to the comparison with the undisturbed run."""

    def __init__(self, work: Path, number: int, kind: str, run: str, seed: int):
        self.work, self.kind, self.run = work, kind, run
        self.folder = work / "faults" / str(number) / "run"
        self.folder.parent.mkdir(parents=True)
        self.random = random.Random(seed * 1_000_003 + number)
        self.starts: list[Process] = []
        self.corpus = work / "corpus"
        self.moment = ""
        self.wrong = ""

    def start(self, prepare: Callable[[], None] | None = None, console: str = "file", **settings) -> Process:
        """Starts the same command (again); see `Process`."""
        experiment = experiment_of(self.run, self.folder, self.corpus, **settings)
        output = self.folder.parent / f"output-{len(self.starts)}"
        self.starts.append(Process(experiment, output, prepare, console))
        return self.starts[-1]

    def finish(self, prepare: Callable[[], None] | None = None, code: int = 0, **settings) -> None:
        """Starts it again and lets it end."""
        found = self.start(prepare, **settings).wait()
        if found != code:
            self.wrong = (
                self.wrong or f"the rerun ended with code {found}: {self.starts[-1].output.strip().splitlines()[-1:]}"
            )

    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint."""
        folder = self.folder / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []

    def until(self, process: Process, condition: Callable[[], bool]) -> bool:
        """Waits for something; False when the run ended before."""
        while not condition():
            if process.poll() is not None:
                return False
            time.sleep(0.001)
        return True

    def outcome(self, reference: str) -> Outcome:
        """Compares with what the undisturbed run left."""
        expected = json.loads((self.work / "references" / f"{reference}.json").read_text())
        gone = self.wrong or lost(expected, remains(self.folder))
        told = [line.strip() for process in self.starts for line in process.output.splitlines() if _TOLD.search(line)]
        return Outcome(self.kind, self.run, self.moment, " | ".join(told).replace(f"{self.folder.parent}/", ""), gone)


def course(work: Path, number: int, kind: str, run: str, seed: int) -> Outcome:
    """Does one fault of `KINDS` to a run ("recall" or "text")."""
    self = Course(work, number, kind, run, seed)
    if kind in ("kill", "NaN batch and kill"):
        prepare = poison(run, 1) if kind != "kill" else None
        _kill_at_random(self, prepare)
        self.finish(prepare)
        return self.outcome(f"{run}-nan" if prepare else run)
    if kind == "kill in a save":
        _kill_in_save(self)
    elif kind == "SIGTERM":
        _terminate(self)
    elif kind == "full disk in prepare":
        with _small_disk(self.folder.with_name("disk")) as full:
            _prepare_on(self, self.folder.with_name("disk") / "prepared", full)
            self.finish()
            return self.outcome(run)
    elif kind.startswith("full disk"):
        with _small_disk(self.folder) as full:
            _fill(self, full, kind.rpartition(" ")[2])
            return self.outcome(run)
    elif kind == "second process":
        _start_twice(self)
        return self.outcome(run)
    elif kind in ("console that cannot print", "closed pipe"):
        self.finish(console={"closed pipe": "closed"}.get(kind, "ascii"))
        return self.outcome(run)
    elif kind == "moved data folder":
        self.corpus = shutil.copytree(self.corpus, self.folder.with_name("corpus"))
        _kill_at_random(self, None)
        self.corpus = self.corpus.rename(self.folder.with_name("moved"))
    elif kind == "NaN batches in a row":
        _many_nans(self)
        return self.outcome(f"{run}-diverged")
    else:
        _damage(self, kind)
        if kind == "all checkpoints damaged":
            self.finish(code=2)
            shutil.rmtree(self.folder / "checkpoints" / "damaged")
    self.finish()
    return self.outcome(run)


def poison(run: str, count: int) -> Callable[[], None]:
    """What puts NaN weights into `count` batches in a row, in the process that calls it."""
    first = NAN_AT[run]

    def prepare() -> None:
        if run == "text":
            read = GlobalBatches.read

            def poisoned(self, number, begin, end):
                batch = read(self, number, begin, end)
                bad = first <= number < first + count
                return dataclasses.replace(batch, weights=np.full_like(batch.weights, np.nan)) if bad else batch

            GlobalBatches.read = poisoned  # type: ignore[method-assign]
            return
        make = MQAR.train_batch

        def made(self, seed, step, *others, **named):
            batch = make(self, seed, step, *others, **named)
            bad = (step >= first) & (step < first + count)
            return dataclasses.replace(batch, weights=jnp.where(bad, jnp.nan, batch.weights))

        MQAR.train_batch = made  # type: ignore[method-assign]

    return prepare


def _kill_at_random(self: Course, prepare: Callable[[], None] | None) -> None:
    timing = json.loads((self.work / "references" / f"{self.run}-seconds.json").read_text())
    process = self.start(prepare)
    at = self.random.uniform(0, 1)
    if at < 0.2:  # somewhere in the start
        time.sleep(at * 5 * timing["start"])
    elif self.until(process, lambda: (self.folder / "metrics.jsonl").exists()):
        time.sleep((at - 0.2) / 0.8 * timing["train"])
    process.send(signal.SIGKILL)
    process.wait()
    self.moment = f"{time.monotonic() - process.begun:.2f} s, checkpoints {self.checkpoints()}"


def _kill_in_save(self: Course) -> None:
    process = self.start()
    steps = 10 if self.run == "recall" else 8
    target = self.folder / "checkpoints" / f"{steps * self.random.randint(1, 5)}.orbax-checkpoint-tmp"
    delay = self.random.choice([0, 0.005, 0.02, 0.05, 0.1])
    if self.until(process, target.exists):
        time.sleep(delay)
    process.send(signal.SIGKILL)
    process.wait()
    left = "left half" if target.exists() else "just ended"
    self.moment = f"{delay * 1000:.0f} ms into the save of step {target.stem} ({left})"


def _terminate(self: Course) -> None:
    process = self.start()
    self.until(process, lambda: (self.folder / "metrics.jsonl").exists())
    time.sleep(self.random.uniform(0, 0.3))
    sent = time.monotonic()
    process.send(signal.SIGTERM)
    code = process.wait()
    took = time.monotonic() - sent
    status = (
        json.loads((self.folder / "result.json").read_text())["status"]
        if (self.folder / "result.json").exists()
        else "no result"
    )
    self.moment = f"{sent - process.begun:.2f} s; ended in {took:.2f} s, code {code}, {status}"
    if code != 0 or status not in ("preempted", "finished"):
        self.wrong = f"SIGTERM ended it with code {code}, {status}"


def _start_twice(self: Course) -> None:
    first = self.start()
    self.until(first, lambda: (self.folder / "metrics.jsonl").exists())
    second = self.start()
    code, running = second.wait(), first.poll() is None
    told = second.output.strip().splitlines()[-1:]
    self.moment = f"{second.begun - first.begun:.2f} s; the second ended with code {code} beside the first: {running}"
    # Started when the first had just ended, it finds a finished run.
    if code != 2 if running else code not in (0, 2):
        self.wrong = f"the second process ended with code {code}: {told}"
    if first.wait() != 0:
        self.wrong = f"the first process ended with code {first.code}: {first.output.strip().splitlines()[-1:]}"


def _damage(self: Course, kind: str) -> None:
    process = self.start()
    wanted = self.random.randint(2, 4) * (10 if self.run == "recall" else 8)
    self.until(process, lambda: bool(self.checkpoints()) and self.checkpoints()[-1] >= wanted)
    process.send(signal.SIGKILL)
    process.wait()
    with contextlib.suppress(FileNotFoundError):
        (self.folder / "result.json").unlink()
    every = self.checkpoints() if kind == "all checkpoints damaged" else self.checkpoints()[-1:]
    for step in every:
        files = sorted(path for path in (self.folder / "checkpoints" / str(step)).rglob("*") if path.is_file())
        path = self.random.choice(files)
        content = bytearray(path.read_bytes())
        if kind == "missing file":
            path.unlink()
        elif kind == "truncated file":
            path.write_bytes(content[: self.random.randrange(max(1, len(content) - 1))])
        else:
            bit = self.random.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(content))
        self.moment = f"step {step}, {path.name[:24]} of {self.checkpoints()}"


def _fill(self: Course, full: Callable[[bool], None], policy: str) -> None:
    at = self.random.randint(2, 4)
    what = self.random.choice(["checkpoint", "metrics"])
    freed = self.folder.with_name("freed")

    def prepare() -> None:
        owner, name = (Checkpoints, "save") if what == "checkpoint" else (RunFolder, "log")
        before = getattr(owner, name)
        calls = 0

        def counted(self, *arguments):
            nonlocal calls
            calls += 1
            first = at if what == "checkpoint" else 10 * at
            if calls in (first, first + (1 if what == "checkpoint" else 12)):
                full(calls == first)
                if calls > first:
                    freed.touch()
            return before(self, *arguments)

        setattr(owner, name, counted)

    code = self.start(prepare, on_disk_full=policy).wait()
    full(False)
    text = self.starts[-1].output
    self.moment = (
        f"{what} {at if what == 'checkpoint' else 10 * at}, {_DISK}; code {code}, checkpoints {self.checkpoints()}"
    )
    # A disk that is still full at the end leaves the last checkpoint or lines unwritten: no run may call that finished.
    if "space" not in text or code != (0 if policy == "continue" and freed.exists() else 2):
        self.wrong = f"code {code} under {policy!r}: {text.strip().splitlines()[-1:]}"
    self.finish(on_disk_full=policy)


def _prepare_on(self: Course, out: Path, full: Callable[[bool], None]) -> None:
    """Prepares the corpus on a full disk, then again on one with space; the run takes what that made."""
    codes = []
    for fill in (True, False):
        full(fill)
        output = self.folder.parent / f"prepared-{len(codes)}"
        pid = os.fork()
        if pid == 0:
            file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = main(["prepare", str(self.corpus), str(out), "--processes", "1"])
            sys.stdout.flush()
            os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        told = output.read_text().splitlines()
        if fill and [line[:7] for line in told if "error" in line] != ["error: "]:
            self.wrong = f"prepare on a full disk printed {told[-1:]}"
    self.moment = f"{_DISK}; code {codes[0]}, then {codes[1]}"
    if codes != [2, 0]:
        self.wrong = self.wrong or f"prepare ended with {codes}: {told[-1:]}"
    self.corpus = out


def _many_nans(self: Course) -> None:
    self.finish(poison(self.run, 3))
    result = json.loads((self.folder / "result.json").read_text())
    self.moment = f"steps {NAN_AT[self.run] + 1} to {NAN_AT[self.run] + 3}; {result['status']}"
    pid = os.fork()
    if pid == 0:
        os._exit(0 if replay(Path(result["failure"]["folder"]), lambda text: None) else 1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        self.wrong = "replay did not reproduce the step"


_DISK = "a tmpfs" if os.geteuid() == 0 else "RLIMIT_FSIZE"


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Callable[[bool], None]]:
    """A disk of 8 MB at `folder` and what fills it (True) or frees it (False) from within the run; where none may be
    mounted, a limit on file sizes that ends writes likewise."""
    global _DISK
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    _DISK = "a tmpfs" if mounted else "RLIMIT_FSIZE"
    # Beside the run's own files, which a folder without config.json may not hold.
    filler = folder / "checkpoints" / "filler"

    def fill(on: bool) -> None:
        if not mounted:
            soft = 200 if on else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
        elif on:
            filler.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(b"\0" * 4096):
                    pass
        else:
            filler.unlink(missing_ok=True)

    try:
        yield fill
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
