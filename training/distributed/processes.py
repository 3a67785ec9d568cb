"""One run over several processes: joining them, what they must agree on, and stopping together.

The engine is jax.distributed. Processes run the same program over the devices of all; process 0 alone prints and writes
the run's files (arrays of checkpoints are written by all). See docs/clusters.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.training.distributed.heartbeat import ROOT, Watch

PEER_TIMEOUT = 30.0
"""Seconds of silence after which a process counts as dead (RECOLLECT_PEER_TIMEOUT changes it); jax's own heartbeats are
given half as much again, so that at the latest after 45 s a run without one of its processes has ended."""
START_TIMEOUT = 300.0
"""Seconds that a process waits for the others at the start (RECOLLECT_START_TIMEOUT)."""

_COMMUNICATION = re.compile(
    r"gloo|nccl|collective|connection|socket|unavailable|deadline_exceeded|barrier|coordination|heartbeat", re.I
)

_watch: Watch | None = None
_uses = itertools.count()
"""Numbers the questions that processes ask each other; all ask in the same order, so they number them alike."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among others: HOST:PORT of process 0, how many there are, and which one this is."""

    coordinator: str
    processes: int
    index: int


def process_index() -> int:
    """This process's number; 0 when it is alone."""
    return 0 if _watch is None else _watch.index


def process_count() -> int:
    """Processes of this run."""
    return 1 if _watch is None else _watch.count


def is_main() -> bool:
    """Whether this process prints and writes files: process 0 does."""
    return process_index() == 0


def place(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> Place | None:
    """What was asked for by arguments, else by RECOLLECT_COORDINATOR, RECOLLECT_PROCESSES and RECOLLECT_PROCESS; None:
    nothing.

    Raises:
      UserError: some are missing, or are impossible.
    """
    coordinator = coordinator or os.environ.get("RECOLLECT_COORDINATOR") or None
    processes = _number("processes", processes)
    index = _number("process", index)
    if processes == 1:
        return None
    given = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process I": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return None
    if missing:
        raise UserError(f"a run over several processes needs {', '.join(given)}; {' and '.join(missing)} is missing")
    assert coordinator is not None and processes is not None and index is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {coordinator}: must be HOST:PORT of process 0, for example 10.0.0.1:9876")
    if processes < 1 or not 0 <= index < processes:
        raise UserError(
            f"--process {index} of --processes {processes}: processes are numbered from 0 to {max(processes, 1) - 1}"
        )
    return Place(coordinator, processes, index)


def initialise(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Joins the other processes, before any device is used; does nothing where there are no others.

    Others there are when arguments or environment variables say so (see `place`), in a step of Slurm or Open MPI with
    several tasks, and
    on the hosts of a TPU slice: there jax finds everything itself.

    Raises:
      UserError: impossible settings, a port that is taken, or a number that two processes have.
    """
    global _watch
    alone = _number("processes", processes) == 1
    where = place(coordinator, processes, index)
    if alone or (where is None and not _detected()):
        return
    timeout = _seconds("RECOLLECT_PEER_TIMEOUT", PEER_TIMEOUT)
    patience = _seconds("RECOLLECT_START_TIMEOUT", START_TIMEOUT)
    where = where or _found_by_jax(patience)
    if where.processes == 1:
        return
    if where.index == 0:
        _check_port(where.coordinator)
    watch = Watch(where.coordinator, where.processes, where.index, timeout)

    import jax

    # The service behind it would catch SIGTERM for itself; `stop_together` is what decides here.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        where.coordinator,
        where.processes,
        where.index,
        initialization_timeout=int(patience),
        heartbeat_timeout_seconds=max(1, int(1.5 * timeout)),
        shutdown_timeout_seconds=60,
    )
    client = _client()
    try:
        client.key_value_set(f"{ROOT}/host/{where.index}", f"{socket.gethostname()}, pid {os.getpid()}")
    except Exception as error:
        raise UserError(
            f"two processes were started as --process {where.index}; each needs a number of its own"
        ) from error
    _watch = watch
    watch.hosts = {
        other: client.blocking_key_value_get(f"{ROOT}/host/{other}", int(1000 * patience)).partition(",")[0]
        for other in range(where.processes)
    }
    watch.joined(client)


@contextlib.contextmanager
def joined(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> Iterator[None]:
    """`initialise`, then whatever is done inside, then an orderly end of all processes.

    An error inside ends this process at once (Python's own way out would wait for the others) and tells the others why:
    exit code 2 after a UserError, 130 after Ctrl-C, 75 when another process is gone, 1 otherwise. Alone, errors go
    their usual way.
    """
    initialise(coordinator, processes, index)
    watch = _watch
    if watch is None:
        yield
        return
    try:
        yield
        _finish(watch)
    except UserError as error:
        line = " ".join(str(error).split())
        _leave(watch, line, f"error: process {watch.index} of {watch.count}: {line}", 2)
    except KeyboardInterrupt:
        _leave(
            watch,
            "stopped by its user",
            f"process {watch.index} stopped; the same commands go on from the last checkpoint",
            130,
        )
    except BaseException as error:
        if _COMMUNICATION.search(f"{type(error).__name__} {error}"):
            watch.failed(error)
        traceback.print_exc()
        _leave(watch, f"{type(error).__name__}: {error}", "", 1)


def _leave(watch: Watch, why: str, line: str, code: int) -> None:
    sys.stdout.flush()
    if line:
        print(line, file=sys.stderr)
    sys.stderr.flush()
    watch.leave(why[:500])
    os._exit(code)


def _finish(watch: Watch) -> None:
    """All processes end together; from here on none is watched."""
    global _watch
    import jax

    _client().wait_at_barrier(f"{ROOT}/end", int(1000 * _seconds("RECOLLECT_START_TIMEOUT", START_TIMEOUT)))
    watch.close()
    _watch = None
    jax.distributed.shutdown()


def gather(what: Any) -> list[Any]:
    """What every process gives (JSON), in their order; all processes call it, in the same order."""
    if _watch is None:
        return [what]
    client, watch = _client(), _watch
    patience = int(1000 * _seconds("RECOLLECT_START_TIMEOUT", START_TIMEOUT))
    key = f"{ROOT}/gather/{next(_uses)}"
    client.key_value_set(f"{key}/{watch.index}", json.dumps(what))
    found = [json.loads(client.blocking_key_value_get(f"{key}/{other}", patience)) for other in range(watch.count)]
    client.wait_at_barrier(key, patience)  # nobody goes on, and ends upon an error, before all have read
    return found


def agree(what: dict[str, Any]) -> None:
    """Checks that all processes hold the same `what` (JSON): configs, versions, digests. Every process raises the same
    error.

    Raises:
      UserError: names the first differing field, with both values.
    """
    found = [_flat(facts) for facts in gather(what)]
    for index, facts in enumerate(found[1:], 1):
        for path in sorted(found[0].keys() | facts.keys()):
            if found[0].get(path) != facts.get(path):
                raise UserError(
                    f"the processes do not run the same thing: {path} is {found[0].get(path)!r} in {_name(0)} and "
                    f"{facts.get(path)!r} in {_name(index)}"
                )


def check_shared(folder: Path) -> None:
    """Checks that all processes see process 0's `folder`, which is made if need be.

    Raises:
      UserError: one does not: the folder must be on a file system that all hosts share.
    """
    if _watch is None:
        return
    name = f".seen-by-all-{secrets.token_hex(8)}"
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    name = gather(name)[0]
    deadline = time.monotonic() + 5  # network file systems show new files late
    while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [index for index, there in enumerate(gather(seen)) if not there]
    if is_main():
        (folder / name).unlink(missing_ok=True)
    gather(0)  # the folder is as it was before anyone goes on
    if blind:
        raise UserError(
            f"{_name(blind[0])} does not see the run folder {folder.absolute()} of process 0; run.directory must be on a file system that "
            "all hosts share"
        )


def stop_together(step: int, wanted: bool, name: str = "run") -> bool:
    """Whether all processes stop now, because one of them wants to (it was sent SIGTERM).

    Called by every process after each call of steps, once its results have been fetched and before the next call
    begins. A process that wants to stop writes down its step and goes on for one more call; the others cannot finish
    that call without it, so at its end all have seen the note, and all stop there.

    Args:
      step: steps done so far.
      wanted: this process was asked to stop.
      name: of the run, where one process trains several in turn.
    """
    if _watch is None:
        return wanted
    client, key = _client(), f"{ROOT}/stop/{name}"
    if wanted:
        with contextlib.suppress(Exception):  # another process wrote first: its step counts
            client.key_value_set(key, str(step), allow_overwrite=False)
    try:
        at = int(client.key_value_try_get(key))
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return False
        raise
    return step > at


def _name(index: int) -> str:
    return _watch.name_of(index) if _watch is not None else "this process"


def _number(name: str, given: int | None) -> int | None:
    variable = f"RECOLLECT_{name.upper()}"
    text = os.environ.get(variable)
    if given is not None or not text:
        return given
    if not text.isdigit():
        raise UserError(f"{variable}={text}: must be a whole number")
    return int(text)


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        value = float(text or default)
    except ValueError:
        value = 0.0
    if value < 2:
        raise UserError(f"{variable}={text}: must be a number of seconds, at least 2")
    return value


def _detected() -> bool:
    """Whether jax.distributed knows this environment and it has several processes. Cheap: asks no server."""
    here = os.environ
    if (
        "SLURM_STEP_NODELIST" in here
        and "SLURM_JOB_ID" in here
        and "SLURM_PROCID" in here
        and int(here.get("SLURM_NTASKS", 1)) > 1
    ):
        return True
    if "OMPI_MCA_orte_hnp_uri" in here and int(here.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if here.get("JAX_PLATFORMS", "tpu").partition(",")[0] != "tpu":
        return False
    from jax._src import (
        cloud_tpu_init,  # jax decides at import whether TPU chips are here; it has no public name for that
    )

    return bool(cloud_tpu_init.running_in_cloud_tpu_vm)


def _found_by_jax(patience: float) -> Place:
    """What jax reads from the environment that `_detected` saw."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() itself asks

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(patience))
    except Exception as error:
        raise UserError(
            f"jax could not read the processes of this cluster: {str(error) or type(error).__name__}"
        ) from error
    coordinator, processes, index = found[:3]
    if coordinator is None or processes is None or index is None:
        return Place("", 1, 0)
    return Place(coordinator, processes, index)


def _check_port(coordinator: str) -> None:
    """jaxlib ends with a segmentation fault where its port is taken."""
    port = int(coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("", port))
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:  # a machine without IPv6
            return
        raise UserError(
            f"--coordinator {coordinator}: port {port} cannot be opened here ({error.strerror}); choose another one"
        ) from error


def _client() -> Any:
    from jax._src import distributed  # the key-value store has no public name; Orbax takes this one too

    return distributed.global_state.client


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list):
        return {path: value}
    rows = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, item in rows:
        found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found
