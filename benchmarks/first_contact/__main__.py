"""Checks, times and explains every kernel on a GPU that is there for minutes. Needs Python 3.12 with jax 0.11.2 and its
CUDA plugin.

    python3 -m recollect.benchmarks.first_contact --seconds 420 --out "$OUT"            # probe, checks, tests, timings
    python3 -m recollect.benchmarks.first_contact --second --seconds 260 --out "$OUT"   # pretraining, peers, profilers
    python3 -m recollect.benchmarks.first_contact --rehearse --out FOLDER               # both, simulated, with faults

The tests are those that are simulated elsewhere; profilers: hardware counters and the memory checker.
This process never imports jax: whatever a kernel does to its process, the rest goes on. Everything is a line in
OUT/first_contact.jsonl the moment it is known (records.py); the table at the end is also OUT/first_contact.txt. `python
main.py bench device --from FOLDER` makes results and documents of the lines. `--only` and `--families` choose parts,
for what is left of a lease.
"""

import argparse
import math
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from recollect.benchmarks.first_contact import processes, records, steps, table

WHEELS = steps.REPOSITORY / ".gpu-wheels"
LEAVE = 10.0  # seconds kept for the table and the caches
TURN = 45.0  # seconds a family may take for its timings
OPTIONS = {
    "out": {"type": Path, "required": True, "help": "folder for the results"},
    "seconds": {"type": float, "default": 420.0, "help": "everything ends by then"},
    "second": {"action": "store_true", "help": "the parts of the second call"},
    "only": {"nargs": "+", "choices": steps.PARTS, "help": "these parts"},
    "families": {"nargs": "+", "metavar": "NAME", "help": "families whose name contains one of these"},
    "tests": {
        "nargs": "+",
        "metavar": "FILE",
        "default": ["tests/pallas_kernels"],
        "help": "of the tests to run on the device",
    },
    "models": {
        "nargs": "+",
        "metavar": "NAME[,path=value...]",
        "default": list(steps.PRETRAINING),
        "help": "what pretraining times, of the experiments of `pretrain`",
    },
    "rehearse": {"action": "store_true", "help": "both calls without a GPU, with faults"},
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; 1 where a kernel was wrong or, in a rehearsal, something was lost; 128 and a signal's number
    where that ended it."""
    parser = _Parser(prog="python3 -m recollect.benchmarks.first_contact", description=__doc__.split("\n\n")[0])
    for name, facts in OPTIONS.items():
        parser.add_argument(f"--{name}", **facts)
    options = parser.parse_args(arguments)
    if not options.seconds >= 3 * LEAVE:
        parser.error(f"--seconds {options.seconds:g}: at least {3 * LEAVE:g} are needed")
    for name in options.families or ():
        if not any(name in family for family in steps.FAMILIES):
            parser.error(f"--families {name}: no family's name contains it; there are {'; '.join(steps.FAMILIES)}")
    for name in options.tests:
        if not Path(name.partition("::")[0]).exists():
            parser.error(f"--tests {name}: it is not here")
    end = time.monotonic() + options.seconds - LEAVE
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / records.FILE).open("a").close()
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be written: {error.strerror}")
    processes.listen()
    stopped = None
    parts = options.only or (steps.PARTS if options.rehearse else steps.SECOND if options.second else steps.FIRST)
    with tempfile.TemporaryDirectory() as scratch:
        plan = steps.Plan(
            Path(scratch),
            options.out,
            _unpacked(Path(scratch) / "site"),
            options.rehearse,
            options.families,
            options.tests,
            options.models,
        )
        contact = Contact(plan, parts, options.out / records.FILE, end)
        records.write(
            "begun",
            path=contact.file,
            command=" ".join(sys.argv[1:]),
            parts=parts,
            date=time.strftime("%Y-%m-%d"),
        )
        try:
            contact.run()
        except processes.Interrupted as interrupted:
            stopped = interrupted.args[0]
        finally:
            processes.end_all(f"the parent was interrupted by {stopped.name}" if stopped else "the parent failed")
            text = table.table(records.read(contact.file))
            (options.out / "first_contact.txt").write_text(text)
            steps.keep_caches(options.out)
            print(text, flush=True)
    if stopped:
        print(f"interrupted by {stopped.name}; what was known by then is in {options.out}", file=sys.stderr)
        return 128 + stopped
    lines = records.read_call(contact.file)
    bad = any(line.get("wrong") or (line["kind"] == "tests" and line["failed"]) for line in lines)
    unchecked = "checks" in parts and not any(line["kind"] == "check" for line in lines)
    return 1 if bad or unchecked or (options.rehearse and steps.lost(lines, plan, parts)) else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, and exit code 2."""
        self.exit(2, f"error: first_contact: {message} (see --help)\n")


class Contact:
    """One call: its parts in order, each ended in time."""

    def __init__(self, plan: steps.Plan, parts: tuple[str, ...], file: Path, end: float):
        self.plan, self.parts, self.file, self.end = plan, parts, file, end

    def run(self) -> None:
        """Runs the parts; what is timed gets ready beside the checks, and then has the GPU one family at a time."""
        self._all(self._steps("probe"), seconds=60)
        timings = self._turns("timings")
        share = max(20.0, 0.55 * self._left()) if "timings" in self.parts else self._left()
        self._all(self._steps("tests", "checks", "full"), share, self.plan.at_once)
        if "tests" in self.parts:
            records.write("tests", path=self.file, **steps.tests_summary(self.plan.out / steps.TESTS_LOG))
        timings.take(self.end, TURN)
        if self.plan.rehearsing:
            self._all(self.plan.again(steps.unanswered(records.read_call(self.file), self.plan, self.parts)))
        models = self._turns("pretraining")
        models.ready(time.monotonic() + 0.5 * self._left())
        models.take(self.end, TURN)
        self._turns("peers").take(self.end, TURN)
        self._all(self._steps("counters", "memory", "trace"))

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _steps(self, *parts: str) -> list[processes.Step]:
        return [step for part in parts if part in self.parts for step in self.plan.steps(part)]

    def _turns(self, part: str) -> processes.Group:
        """Returns the steps of a part, which get ready."""
        gated = self.plan.gated(part, self._left()) if part in self.parts else []
        at_once = self.plan.at_once if self.plan.rehearsing else len(gated)
        group = processes.Group(gated, at_once, self.plan.scratch, self.file)
        group.advance()
        return group

    def _all(self, steps: list[processes.Step], seconds: float = math.inf, at_once: int = 1) -> None:
        end = min(time.monotonic() + seconds, self.end)
        group = processes.Group(steps, at_once, self.plan.scratch, self.file)
        while group.advance():
            self.plan.disturb(group.children, self.file)
            if time.monotonic() > end:
                group.stop("the part's time was over")
                break
            time.sleep(0.1)


def _unpacked(folder: Path) -> Path:
    """Unpacks the wheels that were carried along (make gpu-wheels), as nothing can be installed where no registry is
    reached."""
    folder.mkdir()
    for wheel in sorted(WHEELS.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    # A wheel keeps what belongs beside its package in NAME.data/purelib or platlib.
    for data in [*folder.glob("*.data/purelib"), *folder.glob("*.data/platlib")]:
        shutil.copytree(data, folder, dirs_exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
