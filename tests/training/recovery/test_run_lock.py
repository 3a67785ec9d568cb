"""Two processes in one run folder: the second ends with one line and touches nothing."""

import json
import os
import subprocess
import sys

import pytest

from recollect.configuration import UserError
from recollect.training.recovery import run_lock
from recollect.training.recovery.run_lock import RunLock, locked
from recollect.training.sweeps.population import train_population
from recollect.training.train import train
from tests.training.tiny import tiny


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes this process another host's, with a clock that `sleep` moves."""
    now = [1000.0]
    monkeypatch.setattr(run_lock, "clock", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    monkeypatch.setattr(run_lock, "sleep", move)
    monkeypatch.setattr(run_lock, "host_name", lambda: "node-b")
    return move


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A folder locked by node-a at second 1,000."""
    (tmp_path / "lock").write_text(
        json.dumps({"host": "node-a", "process": 7, "start": "1", "id": "a", "heartbeat": 1000.0})
    )
    return tmp_path


def test_it_lasts_as_long_as_the_block(tmp_path):
    with locked(tmp_path / "new"):
        facts = json.loads((tmp_path / "new" / "lock").read_text())
        assert facts["process"] == os.getpid() and facts["host"] == run_lock.host_name()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("trains", [train, lambda experiment, log: train_population([experiment, experiment], log)])
def test_the_second_process_touches_nothing(tmp_path, trains):
    folder = tmp_path / "run"
    holder = "import sys; from pathlib import Path; from recollect.training.recovery.run_lock import locked\n"
    holder += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        before = contents(folder)
        with pytest.raises(UserError, match=f"{folder} is in use by process {process.pid} on "):
            trains(tiny(folder), lambda line: None)
        assert contents(folder) == before
    finally:
        process.kill()
        process.wait()
    with locked(folder):  # it was killed: its lock is stale
        assert json.loads((folder / "lock").read_text())["process"] == os.getpid()


def test_a_process_of_the_same_number_is_another_one(tmp_path):
    facts = {"host": run_lock.host_name(), "process": os.getpid(), "start": "before", "id": "a", "heartbeat": 0}
    (tmp_path / "lock").write_text(json.dumps(facts))
    RunLock(tmp_path).release()
    assert not (tmp_path / "lock").exists()


def test_another_host_is_believed_while_its_heart_beats(held, elsewhere):
    elsewhere(15)
    with pytest.raises(UserError, match="in use by process 7 on node-a"):
        RunLock(held)


def test_another_host_is_gone_after_60_seconds(held, elsewhere):
    elsewhere(25)  # late: a heartbeat may still come
    lock = RunLock(held)
    assert run_lock.clock() - 1000 > 60
    assert json.loads((held / "lock").read_text())["host"] == "node-b"
    lock.release()


def test_a_heartbeat_that_comes_late_counts(held, elsewhere, monkeypatch):
    def beat(seconds):
        elsewhere(seconds)
        facts = json.loads((held / "lock").read_text())
        (held / "lock").write_text(json.dumps({**facts, "heartbeat": run_lock.clock()}))

    monkeypatch.setattr(run_lock, "sleep", beat)
    elsewhere(25)
    with pytest.raises(UserError, match="in use by process 7 on node-a"):
        RunLock(held)


def test_a_lock_taken_over_meanwhile_is_left_alone(held, elsewhere):
    elsewhere(61)
    lock = RunLock(held)
    (held / "lock").write_text(json.dumps({"host": "node-c", "process": 9, "id": "c", "heartbeat": 1061.0}))
    lock.release()
    assert json.loads((held / "lock").read_text())["id"] == "c" and len(list(held.iterdir())) == 1


def test_it_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.01)
    lock = RunLock(tmp_path)
    begun = json.loads((tmp_path / "lock").read_text())["heartbeat"]
    deadline = run_lock.clock() + 20
    while run_lock.read(tmp_path / "lock")["heartbeat"] == begun:
        assert run_lock.clock() < deadline
    lock.release()


def test_a_half_written_lock_is_fresh(tmp_path):
    (tmp_path / "lock").write_text('{"host": ')
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path)
