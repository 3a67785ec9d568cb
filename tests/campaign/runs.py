"""Runs of the campaign as forked processes, and what they left, compared bit for bit.

Everything is imported before the fork, and no device is used in the process that forks, so that a run costs its tracing
and its steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported for the forked runs, which then start at once.
import chz
import grain  # noqa: F401
import jax
import numpy as np
import orbax.checkpoint as ocp

from recollect.configuration import Preempted, UserError
from recollect.configuration.console import lasting_output
from recollect.training.checkpoint.integrity import damage
from recollect.training.experiment import Experiment
from recollect.training.train import train
from tests.training.tiny import tiny, tiny_text

LIMIT = 300
"""Seconds after which a run counts as hanging."""


def experiment_of(kind: str, folder: Path, corpus: Path, **run: Any) -> Experiment:
    """The campaign's two runs: "recall" and "text", with checkpoints often."""
    if kind == "recall":
        return tiny(
            folder,
            **{"steps": 80, "steps_per_call": 5, "evaluate_every": 40, "checkpoint_every": 10, "log_every": 1, **run},
        )
    return tiny_text(
        folder, corpus, **{"steps": 48, "steps_per_call": 4, "evaluate_every": 24, "checkpoint_every": 8, **run}
    )


class Process:
    """One forked run; `output` is what it printed.

    Args:
      prepare: called in the new process before training: sets up the fault.
      console: what it prints to: the "file" `output`, that file in "ascii", or a "closed" pipe.
    """

    def __init__(
        self,
        experiment: Experiment,
        output: Path,
        prepare: Callable[[], None] | None = None,
        console: str = "file",
    ):
        self.path = output
        self.begun = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(experiment, output, prepare, console))
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code (minus the signal that ended it), None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - self.begun > LIMIT:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = 999
        return self.code

    def wait(self) -> int:
        """The exit code; 999 for a run that hung."""
        while self.poll() is None:
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        """Sends a signal, unless the run has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self.path.read_text(errors="replace") if self.path.exists() else ""


def _run(experiment: Experiment, output: Path, prepare: Callable[[], None] | None, console: str) -> int:
    """What `main.py train` does with its exceptions, in the forked process."""
    if console == "closed":
        reader, file = os.pipe()
        os.close(reader)
    else:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if console == "ascii":
        sys.stdout.reconfigure(encoding="ascii")  # type: ignore[union-attr]
        experiment = chz.replace(experiment, run=chz.replace(experiment.run, sample_every=8))
    with lasting_output():
        return _trained(experiment, prepare)


def _trained(experiment: Experiment, prepare: Callable[[], None] | None) -> int:
    code = 1
    try:
        if prepare is not None:
            prepare()
        result = train(experiment, log=lambda text: print(text, flush=True))
        print(f"status {result['status']}, steps {result['steps']}", flush=True)
        code = 0
    except UserError as error:
        print(f"error: {error}")
        code = 2
    except Preempted:
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def remains(folder: Path) -> dict[str, Any]:
    """What a run left that must not depend on what happened to it: the newest checkpoint's arrays, the lines of metrics
    without times, and the result without times. Read in a forked process, as reading takes a device."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            found = json.dumps(_remains(folder))
        except BaseException as error:
            found = json.dumps({"error": f"{type(error).__name__}: {error}"})
        with os.fdopen(writer, "w") as file:
            file.write(found)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def _remains(folder: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # of Orbax, which is told no shardings here
    checkpoints = folder / "checkpoints"
    step = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    problem = damage(checkpoints / str(step))
    if problem is not None:
        return {"error": f"the last checkpoint: {problem}"}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as loader:
        state = loader.restore(checkpoints / str(step) / "state")
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    timed = ("seconds", "throughput")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    result.get("corpus", {}).pop("source", None)  # it may have moved
    timed_result = (
        *timed,
        "examples_per_second",
        "tokens_per_second",
        "step_seconds",
        "waiting_for_data",
        "mfu",
        "failure",
    )
    return {
        "step": step,
        "state": digest.hexdigest(),
        "metrics": [json.dumps({name: value for name, value in line.items() if name not in timed}) for line in lines],
        "result": json.dumps(
            {name: value for name, value in result.items() if name not in timed_result}, sort_keys=True
        ),
    }


def lost(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """What of `expected` is not in `found`, in words; empty when they are equal."""
    if "error" in found:
        return found["error"]
    for name in ("step", "state", "result"):
        if expected[name] != found[name]:
            return f"{name} differs: {str(found[name])[:60]} instead of {str(expected[name])[:60]}"
    if expected["metrics"] != found["metrics"]:
        pairs = zip(expected["metrics"], found["metrics"], strict=False)
        first = next((number for number, (one, two) in enumerate(pairs, 1) if one != two), None)
        counts = f"{len(found['metrics'])} lines instead of {len(expected['metrics'])}"
        return f"metrics differ: {counts}, the first other one is {first}"
    return ""
