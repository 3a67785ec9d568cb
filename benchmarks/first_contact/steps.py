"""Which children a first contact runs, with their deadlines, on a GPU and in a rehearsal."""

from __future__ import annotations

import os
import random
import re
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recollect.benchmarks.first_contact import records
from recollect.benchmarks.first_contact.processes import Child, Step

REPOSITORY = Path(__file__).resolve().parents[2]

FIRST = ("probe", "checks", "full", "tests", "timings")
SECOND = ("pretraining", "peers", "counters", "memory", "trace")
PARTS = FIRST + SECOND

# Kept here as text: families.py imports jax, which the parent must not.
FAMILIES = (
    "attention d128",
    "recurrence, no decay",
    "recurrence, decay per head",
    "delta rule, decay per head",
    "recurrence, decay per channel",
    "Taylor",
    "attention d64",
    "short convolution",
    "landmark",
    "head mixture",
    "delta rule, decay per channel",
    "long convolution",
    "attention tiles",
)
SWEEPS = ("attention tiles",)
PRETRAINING = ("based_360m", "attention_360m")
PEERS = (
    "gated_delta_rule",
    "simple_gla",
    "causal_attention",
    "sliding_attention",
    "linear_attention",
    "gla",
    "based",
    "kda",
)
COUNTED = ("delta rule, decay per head", "recurrence, no decay", "attention d128")
KERNELS = "regex:.*(linear_recurrence|scheduled_attention|taylor_attention|convolution).*"
CHECKED_FOR_MEMORY = ("recurrence, no decay", "attention d64")
CACHE = Path("/tmp/first_contact_cache")
TESTS_LOG = "device_tests.log"
MAX_FILE = 15 * 2**20  # of what comes back from a lent machine


class Plan:
    """The steps of each part.

    Args:
      scratch: a folder for logs and gates.
      out: the folder of results.
      rehearsing: simulate, at tiny sizes, with faults.
      families: parts of names; None is all.
      tests: files of the tests to run on the device.
      site: unpacked wheels, for the children's path.
    """

    def __init__(
        self, scratch: Path, out: Path, rehearsing: bool, families: list[str] | None, tests: list[str], site: Path
    ):
        self.scratch, self.out, self.rehearsing, self.tests = scratch, out, rehearsing, tests
        self.families = [name for name in FAMILIES if families is None or any(part in name for part in families)]
        self.at_once = 2 if rehearsing else 12
        path = os.pathsep.join([str(REPOSITORY), str(site), os.environ.get("PYTHONPATH", "")])
        self.environment = {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TQDM_DISABLE": "1"}
        self.faults: dict[str, str] = {}
        if rehearsing:
            self.environment |= {"JAX_PLATFORMS": "cpu", records.REHEARSAL_VARIABLE: "1"}
            checked = [name for name in self.families if name not in SWEEPS]
            victims = random.sample(checked, min(3, len(checked)))
            self.faults = dict(zip((f"check: {name}" for name in victims), ("kill", "hang", "abort"), strict=False))
            self.disturbed: set[str] = set()
        else:
            self.environment |= {
                "JAX_PLATFORMS": "cuda,cpu",
                "JAX_COMPILATION_CACHE_DIR": str(CACHE / "programs"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "CUDA_ROOT": "/usr/local/cuda",
                "XLA_FLAGS": f"--xla_gpu_per_fusion_autotune_cache_dir={CACHE / 'autotune'}",
            }
            for name in ("programs", "autotune"):
                (CACHE / name).mkdir(parents=True, exist_ok=True)

    def probe(self) -> list[Step]:
        """Returns the step that looks at the machine."""
        return [self._module("probe", "probe", 60)]

    def timings(self, seconds: float) -> list[tuple[Step, Path]]:
        """Returns a step per family and the file that lets it begin."""
        return [self._gated(f"time: {name}", "timings", name, seconds) for name in self.families]

    def peers(self, seconds: float) -> list[tuple[Step, Path]]:
        """Returns a step per peer and the file that lets it begin."""
        return [self._gated(f"peer: {name}", "peers", name, seconds) for name in PEERS]

    def _gated(self, step: str, module: str, name: str, seconds: float) -> tuple[Step, Path]:
        gate = self.scratch / "".join(c if c.isalnum() else "-" for c in f"gate {step}")
        return self._module(step, module, seconds, name, "--gate", str(gate), "--seconds", "45"), gate

    def again(self, missing: list[str]) -> list[Step]:
        """Returns these checks and timings once more, without gates or faults: starved of processors the simulator
        can hang."""
        found = [step for step in self.steps("checks") if step.name in missing]
        for step, gate in self.timings(75):
            if step.name in missing:
                gate.touch()
                found.append(step)
        return found

    def steps(self, part: str) -> list[Step]:
        """Returns the steps of a part, most valuable first."""
        checked = [name for name in self.families if name not in SWEEPS]
        if part == "checks":
            return [self._module(f"check: {name}", "checks", 75 if self.rehearsing else 110, name) for name in checked]
        if part == "full":
            checked = checked[:1] if self.rehearsing else checked
            return [self._module(f"full size: {name}", "checks", 110, name, "--full") for name in checked]
        if part == "tests":
            return [self._tests()]
        if part == "pretraining":
            return self._pretraining()
        if part == "counters":
            return [self._counters(name) for name in COUNTED if name in self.families]
        if part == "memory":
            return [self._memory(name) for name in CHECKED_FOR_MEMORY if name in self.families]
        assert part == "trace", part
        return [self._module("trace", "trace", 60, str(self.out))]

    def _module(self, step: str, module: str, seconds: float, *arguments: str) -> Step:
        fault = self.faults.get(step, "")
        environment = self.environment | ({records.FAULT_VARIABLE: fault} if fault in ("hang", "abort") else {})
        if fault == "hang":
            seconds = 40
        return Step(
            step,
            [sys.executable, "-m", f"recollect.benchmarks.first_contact.{module}", *arguments],
            seconds,
            environment,
        )

    def _tests(self) -> Step:
        """The tests that are simulated elsewhere, on the device itself; the log has a line for each the moment it
        ends."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu_interpreter",
            "-vv",
            "-p",
            "no:cacheprovider",
            *self.tests,
        ]
        log = self.out / TESTS_LOG
        environment = self.environment | {"RECOLLECT_ON_DEVICE": "1", "XLA_FLAGS": ""}
        if self.rehearsing:
            environment = self.environment
            command[-len(self.tests) :] = ["tests/pallas_kernels/test_landmark_attention_gpu.py", "-k", "serve"]
        else:
            command += ["-n", "7", "--timeout", "120", "--timeout-method", "thread", "--max-worker-restart", "50"]
        return Step("tests", ["bash", "-c", 'exec "$@" >"$0" 2>&1', str(log), *command], 170, environment)

    def _pretraining(self) -> list[Step]:
        overrides = ["run.batch_size=64", "run.accumulate=4"]  # 16 rows at once: 25.9 GiB by `describe --target h100`
        if self.rehearsing:
            overrides = ["run.batch_size=2", "data.length=32", "model.width=32", "model.stages.0.repeats=1"]
        names = ("attention_30m",) if self.rehearsing else PRETRAINING
        found = [self._module(f"pretraining: {name}", "pretraining", 180, name, *overrides) for name in names]
        if (
            self.rehearsing
        ):  # kernels are simulated by an environment that has jax alone; models train in the project's own
            python = str(REPOSITORY / ".venv" / "bin" / "python")
            environment = {**self.environment, "PYTHONPATH": str(REPOSITORY)}
            found = [Step(step.name, [python, *step.command[1:]], step.seconds, environment) for step in found]
        return found

    def _counters(self, name: str) -> Step:
        """Nsight Compute over each of the family's own kernels; clocks are left as they are."""
        inner = self._module(f"counters: {name}", "launch", 75, name)
        options = [
            "--clock-control",
            "none",
            "--set",
            "basic",
            "--section",
            "WarpStateStats",
            "--section",
            "ComputeWorkloadAnalysis",
        ]
        command = ["ncu", *options, "-k", KERNELS, "--launch-count", "8", *inner.command]
        return self._logged(Step(inner.name, command, inner.seconds, inner.environment), "counters.txt")

    def _memory(self, name: str) -> Step:
        inner = self._module(f"memory: {name}", "checks", 75, name)
        command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *inner.command]
        environment = {
            **inner.environment,
            "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        }  # an allocation an array, whose ends are seen
        return self._logged(Step(inner.name, command, inner.seconds, environment), "memory.txt")

    def _logged(self, step: Step, file: str) -> Step:
        """The step with its output appended to a file that comes back."""
        if self.rehearsing:  # neither tool is here: that the command is missing takes nothing with it
            return step
        command = ["bash", "-c", 'exec "$@" >>"$0" 2>&1', str(self.out / file), *step.command]
        return Step(step.name, command, step.seconds, step.environment)

    def disturb(self, children: list[Child], file: Path) -> None:
        """In a rehearsal, kills the child whose turn it is once it has launched something."""
        for child in children:
            name = child.step.name
            if self.faults.get(name) != "kill" or name in self.disturbed or not child.running():
                continue
            if any(line["kind"] == "started" and line["step"] == name for line in records.read_call(file)):
                self.disturbed.add(name)
                child.process.kill()


def keep_caches(out: Path) -> None:
    """Packs the caches of compiled programs and of autotuning into `out`, for a later call; what is too large to
    come back is left."""
    for name in ("programs", "autotune"):
        folder, archive = CACHE / name, out / f"{name}.tar.gz"
        if folder.exists() and any(folder.iterdir()):
            with tarfile.open(archive, "w:gz", compresslevel=1) as packed:
                packed.add(folder, arcname=name)
            if archive.stat().st_size > MAX_FILE:
                archive.unlink()


def unanswered(lines: list[dict[str, Any]], plan: Plan, parts: Sequence[str]) -> list[str]:
    """Returns the checks and timings of a rehearsal that nothing disturbed and that have no result."""
    missing = []
    for part in [step for name, step in (("checks", "check"), ("timings", "time")) if name in parts]:
        for name in plan.families:
            step = f"{part}: {name}"
            excused = step in plan.faults or step in records.dead(lines) or (part == "check" and name in SWEEPS)
            if not excused and not any(line["kind"] == part and line["step"] == step for line in lines):
                missing.append(step)
    return missing


def lost(lines: list[dict[str, Any]], plan: Plan, parts: Sequence[str]) -> list[str]:
    """Returns what a rehearsal of these parts should have in its records and has not, printing each."""
    missing = [f"{step}: no result" for step in unanswered(lines, plan, parts)]
    for step in plan.faults if "checks" in parts else ():
        own = [line for line in lines if line["step"] == step]
        if not any(line["kind"] == "ended" and line["code"] for line in own):
            missing.append(f"{step}: the end of what was disturbed ({plan.faults[step]})")
        if not any(line["kind"] == "started" for line in own):
            missing.append(f"{step}: what was running when it was disturbed")
    for step in records.dead(lines) if "timings" in parts else ():
        if not any(line["step"] == step and line.get("why") == "the family's check died" for line in lines):
            missing.append(f"{step}: that it was skipped")
    if "probe" in parts:
        missing += [f"probe: {name}" for name in ("machine", "eager", "ceilings", "toy") if not _probed(lines, name)]
    for line in missing:
        print(f"LOST {line}")
    return missing


def tests_summary(log: Path) -> dict[str, Any]:
    """Returns how many of the device's tests passed, failed and were left when time was over, and the names of those
    that failed."""
    text = log.read_text(errors="replace") if log.exists() else ""
    line = r"(?m)^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR) (\S.*?) *$|^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR) +\[ *\d+%\]$"
    ends = {name or alone: how or how_alone for how, name, alone, how_alone in re.findall(line, text)}
    total = re.search(r"\[(\d+) items\]|collected \d+ items? / \d+ deselected / (\d+) selected", text)
    counts = {how: sum(each == how for each in ends.values()) for how in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = sorted(name for name, how in ends.items() if how in ("FAILED", "ERROR"))
    left = int(total.group(1) or total.group(2)) - len(ends) if total else None
    summary = f"{counts['PASSED']} passed, {counts['FAILED'] + counts['ERROR']} failed, {counts['SKIPPED']} skipped, {left} not reached"
    return {"summary": summary, "failed": failed}


def _probed(lines: list[dict[str, Any]], name: str) -> bool:
    return any(line["kind"] == "probe" and line["what"] == name for line in lines)
