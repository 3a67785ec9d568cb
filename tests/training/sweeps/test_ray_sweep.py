"""Studies on a real local Ray cluster: the numbers of a study without it, and nothing lost with a worker."""

import csv
import importlib.util
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chz
import jax
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.evaluation.results import load_runs
from recollect.evaluation.table import write_csv
from recollect.main import main
from recollect.training.checkpoint.load import load_params
from recollect.training.experiment import Mesh
from recollect.training.sweeps.ray_sweep import run_study_on_ray
from recollect.training.sweeps.study import run_study
from tests.training.distributed.processes import free_port
from tests.training.tiny import tiny

# Ray is imported by the first test that needs it: it reads the token that the cluster here asks for when it is
# imported.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'ray>=2.40'"
)

SWEEP = ({"optimizer.learning_rate": 1e-2}, {"optimizer.learning_rate": 3e-2})


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """One cluster of two CPUs for all tests here, with a token of its own, that is not on the ports of Ray's
    workers."""
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    port = next(port for port in iter(free_port, None) if port >= 20000)
    program = Path(sys.executable).with_name("ray")
    command = [
        str(program),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=2",
        "--num-gpus=0",
        "--include-dashboard=false",
    ]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    yield f"127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)  # all that the cluster started; SIGTERM takes it half a minute
    process.wait()


def numbers(path: Path) -> list[dict[str, str]]:
    """Rows of a results.csv without what a clock or a place gives."""
    with path.open() as file:
        return [
            {name: value for name, value in row.items() if "second" not in name and name != "folder"}
            for row in csv.DictReader(file)
        ]


def silent(_: str) -> None:
    pass


def test_a_study_gives_the_same_table_and_one_that_cannot_run_stops_no_other(tmp_path, address):
    good = tiny(tmp_path / "unused")
    bad = chz.replace(good, name="too_many_devices", run=chz.replace(good.run, batch_size=64, mesh=Mesh(data=64)))
    alone = run_study([good], SWEEP, tmp_path / "alone", together=False, log=silent)
    said: list[str] = []
    folders, failures = run_study_on_ray([bad, good], SWEEP, tmp_path / "ray", address=address, log=said.append)
    assert [folder.relative_to(tmp_path / "ray") for folder in folders] == [
        folder.relative_to(tmp_path / "alone") for folder in alone
    ]
    assert len(failures) == 2 and all("run.mesh asks for 64 devices; here there are 8" in line for line in failures)
    assert not any("started again" in line for line in said), "a user's mistake is not tried again"
    write_csv(tmp_path / "alone.csv", load_runs(alone))
    write_csv(tmp_path / "ray.csv", load_runs(folders))
    assert numbers(tmp_path / "alone.csv") == numbers(tmp_path / "ray.csv")
    before = [(folder / "result.json").stat().st_mtime_ns for folder in folders]
    again, _ = run_study_on_ray([good], SWEEP, tmp_path / "ray", address=address, log=said.append)
    assert again == folders and "2 finished before" in said[-1]
    assert [(folder / "result.json").stat().st_mtime_ns for folder in again] == before


def test_a_killed_worker_loses_nothing(tmp_path, address):
    experiment = tiny(tmp_path / "unused", steps=400)
    (alone,) = run_study([experiment], ({},), tmp_path / "alone", together=False, log=silent)
    killed: list[int] = []

    def kill() -> None:
        checkpoints = tmp_path / "ray" / "tiny" / "only" / "checkpoints"
        while not any(path.name.isdigit() for path in checkpoints.glob("*")):
            time.sleep(0.01)
        pids = re.findall(r"pid (\d+)", (tmp_path / "ray" / "logs" / "tiny-only.txt").read_text())
        os.kill(int(pids[0]), signal.SIGKILL)
        killed.append(int(pids[0]))

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    said: list[str] = []
    folders, failures = run_study_on_ray([experiment], ({},), tmp_path / "ray", address=address, log=said.append)
    thread.join(5)
    assert killed and not failures
    assert any("lost its worker" in line and "started again from its last checkpoint (1 of 3)" in line for line in said)
    assert "resumed at step" in (tmp_path / "ray" / "logs" / "tiny-only.txt").read_text()
    left, _, steps = load_params(alone / "checkpoints")
    right, _, _ = load_params(folders[0] / "checkpoints")
    assert steps == 400
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_task_that_no_machine_can_hold_is_refused(tmp_path, address):
    with pytest.raises(UserError, match="1000 CPUs and 0 GPUs, which no machine of the cluster has"):
        run_study_on_ray([tiny(tmp_path / "unused")], SWEEP, tmp_path, address=address, cpus=1000, log=silent)


def test_a_folder_that_a_worker_does_not_see_is_named(tmp_path):
    from recollect.training.sweeps.ray_sweep import _train_group

    with pytest.raises(UserError, match="does not see"):
        _train_group([], str(tmp_path), [], str(tmp_path))


def test_without_ray_the_command_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'ray>=2\.40'"):
        run_study_on_ray([tiny(tmp_path / "unused")], SWEEP, tmp_path, log=silent)


def test_what_a_study_can_run_on(capsys):
    assert main(["compare", "mqar.small", "--on", "slurm"]) == 2
    assert "--on slurm: there is ray" in capsys.readouterr().err
    assert main(["compare", "mqar.small", "--on", "ray", "--gpus-per-task", "-1"]) == 2
    assert "--gpus-per-task -1: must not be negative" in capsys.readouterr().err
