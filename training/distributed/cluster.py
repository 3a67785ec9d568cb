"""Where a process stands among the others of its run: from arguments, environment variables, or what jax detects."""

from __future__ import annotations

import dataclasses
import os
import socket

from recollect.configuration import UserError

PEER_TIMEOUT = 30.0
"""Seconds of silence after which a process counts as dead (RECOLLECT_PEER_TIMEOUT changes it); jax's own heartbeats are
given half as much again, so that at the latest after 45 s a run without one of its processes has ended."""
START_TIMEOUT = 300.0
"""Seconds that a process waits for the others at the start and at agreements (RECOLLECT_START_TIMEOUT)."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among others: HOST:PORT of process 0, how many there are, and which one this is."""

    coordinator: str
    processes: int
    index: int


def find_place(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None, timeout: float | None = None
) -> Place | None:
    """Returns the place that arguments name, else RECOLLECT_COORDINATOR, RECOLLECT_PROCESSES and RECOLLECT_PROCESS,
    else the cluster that jax finds itself in (Slurm, Open MPI, a TPU slice). None: there are no other processes.

    Args:
      timeout: seconds that jax's detection may wait for a coordinator; by default RECOLLECT_START_TIMEOUT.

    Raises:
      UserError: some of the three are missing or impossible, or jax cannot read its cluster.
    """
    coordinator = coordinator or os.environ.get("RECOLLECT_COORDINATOR") or None
    processes = _whole_number("processes", processes)
    index = _whole_number("process", index)
    if processes == 1:
        return None
    if coordinator is None and processes is None and index is None:
        return _detect(int(timeout or seconds("RECOLLECT_START_TIMEOUT", START_TIMEOUT)))
    if coordinator is None or processes is None or index is None:
        options = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process I": index}
        missing = " and ".join(name for name, value in options.items() if value is None)
        raise UserError(f"a run over several processes needs {', '.join(options)}; {missing} is missing")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {coordinator}: must be HOST:PORT of process 0, for example 10.0.0.1:9876")
    if processes < 1 or not 0 <= index < processes:
        raise UserError(
            f"--process {index} of --processes {processes}: processes are numbered from 0 to {max(processes, 1) - 1}"
        )
    return Place(coordinator, processes, index)


def check_port(coordinator: str) -> None:
    """Checks that process 0 can open its port; jaxlib would end with a segmentation fault where it is taken.

    Raises:
      UserError: it cannot.
    """
    port = int(coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UserError(
            f"--coordinator {coordinator}: port {port} cannot be opened here ({why}); choose another one"
        ) from error


def seconds(variable: str, default: float) -> float:
    """Returns a number of seconds from an environment variable; raises UserError below 2 or for anything else."""
    text = os.environ.get(variable, "")
    try:
        value = float(text or default)
    except ValueError:
        value = 0.0
    if value < 2:
        raise UserError(f"{variable}={text}: must be a number of seconds, at least 2")
    return value


def _whole_number(name: str, argument: int | None) -> int | None:
    variable = f"RECOLLECT_{name.upper()}"
    text = os.environ.get(variable)
    if argument is not None or not text:
        return argument
    if not text.isdigit():
        raise UserError(f"{variable}={text}: must be a whole number")
    return int(text)


def _detect(timeout: int) -> Place | None:
    """Returns what `jax.distributed.initialize()` finds without arguments; it has no public name before joining."""
    from jax._src.clusters import ClusterEnv

    unset = (None,) * 5
    try:
        address, processes, index, _ = ClusterEnv.auto_detect_unset_distributed_params(*unset, timeout)
    except Exception as error:
        why = str(error) or type(error).__name__
        raise UserError(f"jax could not read the processes of this cluster: {why}") from error
    if address is None or processes is None or index is None or processes == 1:
        return None
    return Place(address, processes, index)
