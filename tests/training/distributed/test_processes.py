"""Real processes over loopback: how they find each other, agree, stop together, and end when one of them dies."""

import signal
import socket
import time

import pytest

from recollect.configuration import UserError
from recollect.training.distributed.cluster import Place, find_place
from recollect.training.distributed.heartbeat import PEER_LOST
from recollect.training.distributed.host import _in_cluster, current_host, joined
from tests.training.distributed.processes import Together, free_port

SCRIPT = ["-m", "tests.training.distributed.together"]


@pytest.mark.parametrize(
    "what", ["loop", pytest.param("wait", marks=pytest.mark.slow)], ids=["in a collective", "outside one"]
)
@pytest.mark.parametrize("dead", [0, 1], ids=["coordinator", "other"])
def test_a_process_that_dies_ends_the_other_with_a_clear_line(tmp_path, dead, what):
    with Together(tmp_path, [*SCRIPT, what, str(tmp_path)]) as run:
        for index in (0, 1):
            run.until("ready, gathered [0, 1]", index)
        run.send(dead, signal.SIGKILL)
        begun = time.monotonic()
        codes = run.codes()
        assert time.monotonic() - begun < 30, "with 4 s of silence allowed (30 by default, on an idle machine)"
        assert codes == {dead: -signal.SIGKILL, 1 - dead: PEER_LOST}
        line = next(line for line in run.output(1 - dead).splitlines() if line.startswith("error: "))
        assert line.startswith(f"error: process {dead} of 2 (") and "stopped answering" in line
        assert "start all 2 processes again" in line


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_other(tmp_path):
    with Together(tmp_path, [*SCRIPT, "loop", str(tmp_path)]) as run:
        run.until("ready", 1)
        run.send(0, signal.SIGSTOP)
        begun = time.monotonic()
        assert run.processes[1].wait(30) == PEER_LOST and time.monotonic() - begun < 30
        assert "error: process 0 of 2" in run.output(1)


def test_an_error_of_one_process_is_told_by_all(tmp_path):
    with Together(tmp_path, [*SCRIPT, "full disk", str(tmp_path)]) as run:
        assert run.codes() == {0: PEER_LOST, 1: 2}
        assert "error: process 1 of 2: the disk is full" in run.output(1)
        assert "ended: the disk is full; process 0 stops too" in run.output(0)


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_stops_all_at_the_same_step(tmp_path, asked):
    with Together(tmp_path, [*SCRIPT, "loop", str(tmp_path)]) as run:
        for index in (0, 1):
            run.until("ready", index)
        run.send(asked, signal.SIGTERM)
        assert run.codes() == {0: 0, 1: 0}
        steps = {run.output(index).rpartition("stopped at step ")[2] for index in (0, 1)}
        assert len(steps) == 1 and int(steps.pop()) > 0


def test_processes_that_do_not_run_the_same_thing_say_so(tmp_path):
    with Together(tmp_path, [*SCRIPT, "differ", str(tmp_path)]) as run:
        assert run.codes() == {0: 2, 1: 2}
        for index in (0, 1):
            assert "config.steps.1 is 20 in process 0 of 2" in run.output(
                index
            ) and "and 21 in process 1 of 2" in run.output(index)


def test_a_run_folder_that_is_not_shared_is_found(tmp_path):
    with Together(tmp_path, [*SCRIPT, "blind", str(tmp_path)]) as run:
        assert run.codes() == {0: 2, 1: 2}
        assert f"does not see the run folder {tmp_path}/0" in run.output(0)
    assert not list((tmp_path / "0").iterdir()), "the trial file is taken away"


@pytest.mark.parametrize("here", [0, 1])
def test_a_process_that_never_comes_is_waited_for_as_long_as_stated(tmp_path, here):
    with Together(tmp_path, [*SCRIPT, "end", str(tmp_path)], only=(here,), RECOLLECT_START_TIMEOUT="3") as run:
        assert run.codes(60) == {here: PEER_LOST}
        expected = "not all 2 processes joined" if here == 0 else f"no coordinator answers at {run.address}"
        assert f"error: process {here} of 2: {expected}" in run.output(here)


def test_a_taken_port_is_refused(tmp_path):
    port = free_port()
    refusal = pytest.raises(UserError, match=rf"port {port} cannot be opened")
    with socket.create_server(("", port)), refusal, joined(f"127.0.0.1:{port}", 2, 0):
        pass


def test_where_a_process_stands(monkeypatch):
    for name in ("COORDINATOR", "PROCESSES", "PROCESS"):
        monkeypatch.delenv(f"RECOLLECT_{name}", raising=False)
    assert find_place() is None
    assert find_place(processes=1) is None
    assert find_place("host:1234", 4, 3) == Place("host:1234", 4, 3)
    monkeypatch.setenv("RECOLLECT_COORDINATOR", "10.0.0.1:9876")
    monkeypatch.setenv("RECOLLECT_PROCESSES", "2")
    monkeypatch.setenv("RECOLLECT_PROCESS", "0")
    assert find_place() == Place("10.0.0.1:9876", 2, 0)
    assert find_place(index=1) == Place("10.0.0.1:9876", 2, 1), "an argument goes before a variable"
    with pytest.raises(UserError, match="numbered from 0 to 1"):
        find_place(index=2)
    with pytest.raises(UserError, match="must be HOST:PORT"):
        find_place(coordinator="10.0.0.1")
    monkeypatch.setenv("RECOLLECT_PROCESS", "one")
    with pytest.raises(UserError, match="RECOLLECT_PROCESS=one"):
        find_place()
    monkeypatch.delenv("RECOLLECT_PROCESS")
    with pytest.raises(UserError, match="--process I is missing"):
        find_place()


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    "variables, host, processes, index",
    [(SLURM, "node03", 2, 1), (OPEN_MPI, "10.96.0.1", 4, 3)],
    ids=["Slurm", "Open MPI"],
)
def test_a_cluster_that_jax_knows_needs_no_arguments(monkeypatch, variables, host, processes, index):
    assert not _in_cluster() and find_place() is None, "this machine is none"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _in_cluster()
    found = find_place(timeout=5)
    assert (found.coordinator.rpartition(":")[0], found.processes, found.index) == (host, processes, index)
    monkeypatch.setenv("RECOLLECT_PROCESSES", "1")
    with joined() as host:  # alone, where asked to be
        assert host.count == 1 and host is current_host()
