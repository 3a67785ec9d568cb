"""Several real processes train one model: whatever dies, stops or moves, the run ends with the bits of an
undisturbed one."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import recollect.data.text.dataset
import recollect.training.experiment  # noqa: F401
from recollect.training.distributed.heartbeat import PEER_LOST
from tests.training.distributed.processes import Together
from tests.training.same_run import assert_same_run

STEPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, 4, np.uint8)).decode() for _ in range(40)]
    for index in range(40):
        (folder / f"{index}.txt").write_text(" ".join(rng.choice(words, 60)))
    return folder


class Runs:
    """Starts a tiny text model's training in one folder, over any number of processes."""

    def __init__(self, tmp_path: Path, corpus: Path, devices: int):
        self.tmp_path, self.corpus, self.devices = tmp_path, corpus, devices

    def start(self, name: str, processes: int, **settings) -> Together:
        values = {
            "run.directory": self.tmp_path / name,
            "run.mesh.data": self.devices,
            "run.steps": STEPS,
            "run.steps_per_call": 2,
            "run.checkpoint_every": 10,
            "run.evaluate_every": 20,
            "run.log_every": 2,
            "run.sample_every": 40,
            "run.batch_size": 4,
            "run.precision": "highest",
            "model.width": 16,
            "model.mlp.hidden": 32,
            "model.stages.0.repeats": 2,
            "data.source": self.corpus,
            "data.length": 32,
            "data.held_out_bytes": 256,
            "optimizer.warmup": 5,
            **settings,
        }
        command = ["main.py", "train", "text.attention", *(f"{path}={value}" for path, value in values.items())]
        cache = {
            "XDG_CACHE_HOME": str(self.tmp_path / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(self.tmp_path / "compiled"),
        }
        quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}
        return Together(
            self.tmp_path / f"output-{name}-{time.monotonic_ns()}",
            command,
            processes,
            self.devices // processes,
            **cache,
            **quick,
        )

    def finish(self, name: str, processes: int, **settings) -> Together:
        with self.start(name, processes, **settings) as run:
            assert run.codes(300) == dict.fromkeys(range(processes), 0), "\n".join(
                run.output(index)[-3000:] for index in range(processes)
            )
        return run

    def result(self, name: str) -> dict:
        return json.loads((self.tmp_path / name / "result.json").read_text())

    def until_checkpoint(self, name: str, run: Together) -> None:
        folder = self.tmp_path / name / "checkpoints"
        while not any(path.name.isdigit() for path in folder.glob("*")):
            assert all(process.poll() is None for process in run.processes.values()), run.output(0)[-3000:]
            time.sleep(0.02)

    def same_bits(self, one: str, two: str) -> None:
        assert_same_run(self.tmp_path / one, self.tmp_path / two, STEPS)


def lose_one(runs: Runs, processes: int, dead: int) -> None:
    """Trains with one process killed after the first checkpoint, then again with all, and compares with a run left
    alone."""
    undisturbed = runs.finish("alone", processes)
    assert "result:" in undisturbed.output(0) and "result:" not in undisturbed.output(1), "process 0 alone prints"
    assert "sample: " in undisturbed.output(0)
    with runs.start("killed", processes) as run:
        runs.until_checkpoint("killed", run)
        run.send(dead, signal.SIGKILL)
        begun = time.monotonic()
        codes = run.codes(60)
        assert time.monotonic() - begun < 60
        assert codes.pop(dead) == -signal.SIGKILL and set(codes.values()) == {PEER_LOST}
        for index in codes:
            assert f"error: process {dead} of {processes}" in run.output(index), run.output(index)[-2000:]
    shutil.copytree(runs.tmp_path / "killed", runs.tmp_path / "moved")
    resumed = runs.finish("killed", processes)
    assert "resumed at step" in resumed.output(0)
    runs.same_bits("alone", "killed")


def test_one_of_two_processes_dies_and_the_rerun_ends_with_the_same_bits(tmp_path, corpus):
    runs = Runs(tmp_path, corpus, devices=2)
    lose_one(runs, 2, dead=1)
    # One process with as many devices goes on too. The mesh is the same, and a sum of two numbers has one order.
    moved = runs.finish("moved", 1)
    assert "resumed at step" in moved.output(0)
    runs.same_bits("alone", "moved")


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 2])
def test_one_of_four_processes_dies_and_the_rerun_ends_with_the_same_bits(tmp_path, corpus, dead):
    lose_one(Runs(tmp_path, corpus, devices=4), 4, dead)


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_at_one_step_and_any_number_of_processes_goes_on(tmp_path, corpus):
    runs = Runs(tmp_path, corpus, devices=2)
    runs.finish("alone", 1)
    for name, first, then in (("two-then-one", 2, 1), ("one-then-two", 1, 2)):
        with runs.start(name, first) as run:
            runs.until_checkpoint(name, run)
            run.send(first - 1, signal.SIGTERM)
            assert set(run.codes(120).values()) == {0}, run.output(0)[-2000:]
        stopped = runs.result(name)
        assert stopped["status"] == "preempted" and 10 <= stopped["steps"] < STEPS
        runs.finish(name, then)
        assert runs.result(name)["status"] == "finished"
        runs.same_bits("alone", name)


@pytest.mark.slow
def test_other_configs_and_a_mesh_without_all_devices_are_refused(tmp_path, corpus):
    runs = Runs(tmp_path, corpus, devices=2)
    with runs.start("small", 2, **{"run.mesh.data": 1}) as run:
        assert run.codes(120) == {0: 2, 1: 2}
        assert (
            "run.mesh uses 1 of the 2 devices of 2 processes" in run.output(0)
            and not (tmp_path / "small" / "config.json").exists()
        )
