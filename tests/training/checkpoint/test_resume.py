"""Killed with SIGKILL at a random moment and started again, a run ends with the parameters of one that was left
alone, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from recollect.configuration import UserError
from recollect.evaluation.results import load_run
from recollect.training.checkpoint.orbax_folder import Checkpoints
from recollect.training.run_folder import RunFolder
from recollect.training.train import train
from tests.quick_compilation import XLA_FLAGS
from tests.training.same_run import assert_same_run
from tests.training.tiny import tiny

PROJECT = Path(__file__).resolve().parents[3]

SCRIPT = """
import sys
sys.path.insert(0, {project!r})
from pathlib import Path
from tests.training.tiny import tiny
from recollect.training.train import train
train(tiny(Path({folder!r}), steps=240, checkpoint_every=20, evaluate_every=120))
"""


def run_process(folder):
    # One compilation serves all processes of a test.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS, **cache}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(project=str(PROJECT), folder=str(folder))],
        env=environment,
        stdout=subprocess.DEVNULL,
    )


def test_sigkill_at_random_moments_changes_no_bit(tmp_path):
    assert run_process(tmp_path / "alone").wait() == 0
    rng = random.Random(time.time_ns())
    kills = 0
    checkpoints = tmp_path / "killed" / "checkpoints"
    while True:
        process = run_process(tmp_path / "killed")
        # A third of the way into training at most, so that more than one kill lands inside it.
        before = set(checkpoints.iterdir()) if checkpoints.exists() else set()
        while (
            process.poll() is None
            and kills < 3
            and (set(checkpoints.iterdir()) if checkpoints.exists() else set()) == before
        ):
            time.sleep(0.02)
        if kills < 3 and process.poll() is None:
            time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None and kills < 3:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.wait() == 0
        break
    assert kills >= 1
    assert_same_run(tmp_path / "alone", tmp_path / "killed", 240)


def test_sigterm_saves_and_the_rerun_goes_on(tmp_path):
    process = run_process(tmp_path / "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "preempted" and 0 < result["steps"] < 240
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == result["steps"], "SIGTERM leaves a checkpoint"
    with pytest.raises(UserError, match="preempted; the same train command goes on"):
        load_run(tmp_path / "run")
    assert run_process(tmp_path / "run").wait() == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["status"]) == (240, "finished")


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    RunFolder(tmp_path / "run", tiny(tmp_path / "run", learning_rate=0.7))
    RunFolder(tmp_path / "run", tiny(tmp_path / "run")).log({"step": 1})  # nothing was trained before: no refusal
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.01 there, 0\.5 now"):
        RunFolder(tmp_path / "run", tiny(tmp_path / "run", learning_rate=0.5))
    RunFolder(tmp_path / "run", tiny(tmp_path / "run", steps=1000, log_every=7))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run's folder"):
        RunFolder(tmp_path, tiny(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_folder_holds_what_it_promises(tmp_path):
    result = train(tiny(tmp_path / "run"), log=lambda text: None)
    assert {"config.json", "environment.json", "metrics.jsonl", "result.json", "checkpoints"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    for name in (
        "accuracy",
        "accuracy_by_slice",
        "loss",
        "steps",
        "seconds",
        "examples_per_second",
        "parameters",
        "state_bytes",
    ):
        assert name in stored
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (
        environment["packages"]["jax"] == jax.__version__ and environment["device_kind"] and "git_commit" in environment
    )
