"""Seconds from the command to the first step's end and to the run's end: `python -m recollect.benchmarks.cold_start`.

Runs `train mqar.attention run.steps=1` (with its evaluation and checkpoint) in processes of their own, first with an
empty folder of compiled programs, then with the filled one, and prints where the time goes. Wall seconds count on a
machine at rest; user seconds say how much work it is on a busy one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recollect.benchmarks.reporting import child_environment

SCRIPT = """
import json, os, resource, sys, time

begun = float(sys.argv[1])
durations = {}
first = {}

def user():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

from recollect.main import main
import jax
import recollect.training.train
from recollect.experiments import mqar
from recollect.training.batches import StepPipeline

imported = time.time() - begun

def note(event, seconds, **_):
    durations[event] = durations.get(event, 0.0) + seconds

jax.monitoring.register_event_duration_secs_listener(note)
fetch = StepPipeline.fetch

def fetched(self):
    call = fetch(self)
    first.update(wall=time.time() - begun, user=user(), durations=dict(durations))
    return call

StepPipeline.fetch = fetched
main(["train", "mqar.attention", "run.steps=1", "run.directory=" + sys.argv[2]])
total = {"wall": time.time() - begun, "user": user()}
with open(sys.argv[3], "w") as file:
    json.dump({"import": imported, "first": first, "total": total, "durations": durations}, file)
"""

EVENTS = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lower": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compile or load": "/jax/core/compile/backend_compile_duration",
}
PARTS = ("import", *EVENTS, "other, to the first step", "evaluation and checkpoint")
ROWS = {
    "first": "to the first step's end",
    "total": "whole run",
    "first_user": "to the first step, CPU seconds",
    "user": "whole run, CPU seconds",
    **{part: f"  {part}" for part in PARTS},
}
"""What is printed, and its label."""


def measure(folder: Path, name: str) -> dict[str, float]:
    """Returns the times of one run, with compiled programs in `folder`/cache."""
    out = folder / f"{name}.json"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(time.time()), str(folder / name), str(out)],
        check=True,
        env=child_environment(JAX_PLATFORMS="cpu", RECOLLECT_CACHE=str(folder / "cache")),
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    times = json.loads(out.read_text())
    first, total = times["first"], times["total"]
    parts = {"import": times["import"]} | {part: first["durations"].get(event, 0.0) for part, event in EVENTS.items()}
    parts["other, to the first step"] = first["wall"] - sum(parts.values())
    parts["evaluation and checkpoint"] = total["wall"] - first["wall"]
    return {"first": first["wall"], "total": total["wall"], "user": total["user"], "first_user": first["user"], **parts}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; prints a table."""
    parser = argparse.ArgumentParser(prog="cold_start", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    rows: dict[str, list[dict[str, float]]] = {"empty": [], "filled": []}
    for _ in range(parser.parse_args(arguments).rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind, measured in rows.items():
                measured.append(measure(Path(folder), kind))
    print(f"{'seconds, compile cache':32} {'empty':>8} {'filled':>8}")
    for name, text in ROWS.items():
        empty, filled = (statistics.median(row[name] for row in measured) for measured in rows.values())
        print(f"{text:32} {empty:8.2f} {filled:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
