"""Which children a first contact runs, with their deadlines, on a GPU and in a rehearsal."""

import os
import random
import re
import sys
import tarfile
from pathlib import Path

from recollect.benchmarks.first_contact import processes, records
from recollect.benchmarks.first_contact.families import FAMILIES, SWEEPS

REPOSITORY = Path(__file__).resolve().parents[2]

FIRST = ("probe", "checks", "full", "tests", "timings")
SECOND = ("pretraining", "peers", "counters", "memory", "trace")
PARTS = FIRST + SECOND

# 16 rows at once: 25.9 GiB for Based by `describe`.
PRETRAINING = tuple(f"{name},run.batch_size=64,run.accumulate=4" for name in ("based_360m", "attention_360m"))
PEERS = (
    *("gated_delta_rule", "simple_gla", "causal_attention", "sliding_attention", "linear_attention", "gla"),
    *("based", "kda"),
)
COUNTED = ("delta rule, decay per head", "recurrence, no decay", "attention d128")
CHECKED_FOR_MEMORY = ("recurrence, no decay", "attention d64")
CACHE = Path("/tmp/first_contact_cache")
TESTS_LOG = "device_tests.log"
WORKERS = ("-n", "7", "--max-worker-restart", "50", "--timeout", "120", "--timeout-method", "thread")
REHEARSED_TESTS = ("tests/pallas_kernels/test_landmark_attention_gpu.py", "-k", "serve")
MAX_FILE = 15 * 2**20  # of what comes back from a lent machine
REHEARSED_MODELS = ("attention_30m,run.batch_size=2,data.length=32,model.width=32,model.stages.0.repeats=1",)
REHEARSED = {"JAX_PLATFORMS": "cpu", records.REHEARSAL_VARIABLE: "1"}
ON_GPU = {
    "JAX_PLATFORMS": "cuda,cpu",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "CUDA_ROOT": "/usr/local/cuda",
    "XLA_FLAGS": f"--xla_gpu_per_fusion_autotune_cache_dir={CACHE / 'autotune'}",
}
"""Environments of the children."""
NCU = (
    *("ncu", "--clock-control", "none", "--set", "basic", "--section", "WarpStateStats"),
    *("--section", "ComputeWorkloadAnalysis", "--launch-count", "8"),
    *("-k", "regex:.*(linear_recurrence|scheduled_attention|taylor_attention|convolution).*"),
)
"""Nsight Compute over each of a family's own kernels; clocks are left as they are."""
EACH_ARRAY = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
"""An allocation per array, whose ends the memory checker sees."""
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")


class Plan:
    """The steps of each part.

    Args:
      scratch: a folder for logs and gates.
      out: the folder of results.
      site: unpacked wheels, for the children's path.
      rehearsing: simulate, at tiny sizes, with faults.
      families: parts of names; None is all.
      tests: files of the tests to run on the device.
      models: experiments of `pretrain`, each with overrides after commas.
    """

    def __init__(
        self,
        scratch: Path,
        out: Path,
        site: Path,
        rehearsing: bool,
        families: list[str] | None,
        tests: list[str],
        models: list[str],
    ):
        self.scratch, self.out, self.rehearsing, self.tests = scratch, out, rehearsing, tests
        self.models = REHEARSED_MODELS if rehearsing else models
        self.families = [name for name in FAMILIES if families is None or any(part in name for part in families)]
        self.checked = [name for name in self.families if name not in SWEEPS]
        self.at_once = 2 if rehearsing else 12
        self.environment = {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(site), os.environ.get("PYTHONPATH", "")]),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TQDM_DISABLE": "1",
            **(REHEARSED if rehearsing else ON_GPU),
        }
        victims = random.sample(self.checked, min(3, len(self.checked))) if rehearsing else []
        self.faults = dict(zip((f"check: {name}" for name in victims), ("kill", "hang", "abort"), strict=False))
        for name in () if rehearsing else ("programs", "autotune"):
            (CACHE / name).mkdir(parents=True, exist_ok=True)

    def gated(self, part: str, seconds: float) -> list[processes.Step]:
        """Returns the steps of "timings", one per family, of "pretraining", one per model, or of "peers", each behind
        its gate."""
        kind, arguments = {
            "timings": ("time", {name: [name] for name in self.families}),
            "pretraining": ("pretraining", {model: model.split(",") for model in self.models}),
            "peers": ("peer", {name: [name] for name in PEERS}),
        }[part]
        gates = {name: self.scratch / processes.plain(f"gate {kind} {name}") for name in arguments}
        steps = [
            self._module(
                f"{kind}: {name}", part, seconds, *arguments[name], "--gate", str(gate), "--seconds", "45", gate=gate
            )
            for name, gate in gates.items()
        ]
        return [self._in_the_project(step) for step in steps] if part == "pretraining" and self.rehearsing else steps

    def again(self, missing: list[str]) -> list[processes.Step]:
        """Returns these checks and timings once more, without gates or faults: starved of processors the simulator
        can hang."""
        timings = self.gated("timings", 75)
        for step in timings:
            step.gate.touch()
        return [step for step in (*self.steps("checks"), *timings) if step.name in missing]

    def steps(self, part: str) -> list[processes.Step]:
        """Returns the steps of a part, most valuable first."""
        seconds = 75 if self.rehearsing else 110
        counted, for_memory = ([x for x in names if x in self.families] for names in (COUNTED, CHECKED_FOR_MEMORY))
        return {
            "probe": [self._module("probe", "probe", 60)],
            "checks": [self._module(f"check: {name}", "checks", seconds, name) for name in self.checked],
            "full": [
                self._module(f"full size: {name}", "checks", 110, name, "--full")
                for name in self.checked[: 1 if self.rehearsing else None]
            ],
            "tests": [self._tests()],
            "counters": [self._under(NCU, "counters", name, "profilers") for name in counted],
            "memory": [self._under(SANITIZER, "memory", name, "checks", **EACH_ARRAY) for name in for_memory],
            "trace": [self._module("trace", "profilers", 60, "--trace", str(self.out))],
        }[part]

    def _module(
        self, step: str, module: str, seconds: float, *arguments: str, gate: Path | None = None
    ) -> processes.Step:
        fault = self.faults.get(step, "")
        command = [sys.executable, "-m", f"recollect.benchmarks.first_contact.{module}", *arguments]
        # A child that is to be killed knows nothing of it.
        environment = self.environment | ({records.FAULT_VARIABLE: fault} if fault in ("hang", "abort") else {})
        return processes.Step(step, command, 40 if fault == "hang" else seconds, environment, gate)

    def _tests(self) -> processes.Step:
        """The tests that are simulated elsewhere, on the device itself; the log has a line for each the moment it
        ends."""
        command = [sys.executable, "-m", "pytest", "-m", "gpu_interpreter", "-vv", "-p", "no:cacheprovider"]
        chosen = REHEARSED_TESTS if self.rehearsing else [*self.tests, *WORKERS]
        on_device = {} if self.rehearsing else {"RECOLLECT_ON_DEVICE": "1", "XLA_FLAGS": ""}
        step = processes.Step("tests", [*command, *chosen], 170, {**self.environment, **on_device})
        return self._redirected(step, ">", TESTS_LOG)

    @staticmethod
    def _in_the_project(step: processes.Step) -> processes.Step:
        """Returns the step in the project's own environment, in which models train: kernels are simulated by one that
        has jax alone."""
        return step._replace(
            command=[str(REPOSITORY / ".venv" / "bin" / "python"), *step.command[1:]],
            environment={**step.environment, "PYTHONPATH": str(REPOSITORY)},
        )

    def _under(self, tool: tuple[str, ...], part: str, name: str, module: str, **environment: str) -> processes.Step:
        """Returns a module's step for a family, run by a tool, with its output appended to a file that comes back."""
        step = self._module(f"{part}: {name}", module, 75, name)
        step = step._replace(command=[*tool, *step.command], environment={**step.environment, **environment})
        # In a rehearsal neither tool is here: that the command is missing takes nothing with it.
        return step if self.rehearsing else self._redirected(step, ">>", f"{part}.txt")

    def _redirected(self, step: processes.Step, how: str, file: str) -> processes.Step:
        return step._replace(command=["bash", "-c", f'exec "$@" {how}"$0" 2>&1', str(self.out / file), *step.command])

    def disturb(self, children: list[processes.Child], file: Path) -> None:
        """In a rehearsal, kills the child whose turn it is once it has launched something."""
        for child in children:
            victim = self.faults.get(child.step.name) == "kill" and child.running()
            lines = records.read_call(file) if victim else []
            if any(line["kind"] == "started" and line["step"] == child.step.name for line in lines):
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


def unanswered(lines: list[dict], plan: Plan, parts: tuple[str, ...]) -> list[str]:
    """Returns the checks and timings of a rehearsal that nothing disturbed and that have no result."""
    answered = {line["step"] for line in lines if line["kind"] == line["step"].partition(":")[0]}
    expected = [f"check: {name}" for name in plan.checked if "checks" in parts]
    expected += [f"time: {name}" for name in plan.families if "timings" in parts]
    return [step for step in expected if step not in {*plan.faults, *records.dead(lines), *answered}]


def lost(lines: list[dict], plan: Plan, parts: tuple[str, ...]) -> list[str]:
    """Returns what a rehearsal of these parts should have in its records and has not, printing each."""
    missing = [f"{step}: no result" for step in unanswered(lines, plan, parts)]
    ends = {line["step"]: line for line in lines if line["kind"] == "ended"}
    begun = {line["step"] for line in lines if line["kind"] == "started"}
    probed = {line["what"] for line in lines if line["kind"] == "probe"}
    for step, fault in plan.faults.items() if "checks" in parts else ():
        missing += [] if ends.get(step, {}).get("code") else [f"{step}: the end of what was disturbed ({fault})"]
        missing += [] if step in begun else [f"{step}: what was running when it was disturbed"]
    skipped = {step for step, end in ends.items() if end.get("why") == "the family's check died"}
    if "timings" in parts:
        missing += [f"{step}: that it was skipped" for step in records.dead(lines) - skipped]
    if "probe" in parts:
        missing += [f"probe: {name}" for name in ("machine", "eager", "ceilings", "toy") if name not in probed]
    print("".join(f"LOST {line}\n" for line in missing), end="")
    return missing


LINE = (
    r"(?m)^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR) (\S.*?) *$"
    r"|^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR) +\[ *\d+%\]$"
)
"""A test's end in pytest's log: of a worker, and without workers."""


def tests_summary(log: Path) -> dict:
    """Returns how many of the device's tests passed, failed and were left when time was over, and the names of those
    that failed."""
    text = log.read_text(errors="replace") if log.exists() else ""
    ends = {name or alone: how or how_alone for how, name, alone, how_alone in re.findall(LINE, text)}
    total = re.search(r"\[(\d+) items\]|collected \d+ items? / \d+ deselected / (\d+) selected", text)
    failed = sorted(name for name, how in ends.items() if how in ("FAILED", "ERROR"))
    passed, skipped = (sum(how == each for how in ends.values()) for each in ("PASSED", "SKIPPED"))
    left = int(total[1] or total[2]) - len(ends) if total else None
    return {
        "summary": f"{passed} passed, {len(failed)} failed, {skipped} skipped, {left} not reached",
        "failed": failed,
    }
