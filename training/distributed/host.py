"""The processes that train one run, behind one object whose default is a process alone.

`current_host()` returns it. Code that must be the same over one process or many asks this object and no other module:

    host = current_host()
    if host.is_main: ...                  # prints, writes metrics.jsonl and result.json
    step = host.broadcast(step)           # what the main process found

Every method is collective: all processes call it, in the same order. Decisions that change what a process does next
(stop, save, roll back) go through here, so that all take them at the same step: one that left the loop alone would
leave the others waiting in a collective. See docs/clusters.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Host:
    """One process, alone: what it says is agreed.

    Attributes:
      index: this process's number, from 0.
      count: processes of the run.
    """

    index, count = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files: process 0 does."""
        return self.index == 0

    def broadcast(self, value: Any) -> Any:
        """Returns the main process's `value` (JSON-ready) in every process."""
        return value

    def largest(self, value: int) -> int:
        """Returns the largest `value` of all processes."""
        return value

    def wait_for_all(self) -> None:
        """Returns once every process has called it."""

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raises the same UserError in every process, with both values of the first differing field, unless all hold
        the same `facts` (JSON-ready): configs, versions, digests."""

    def check_shared(self, folder: Path) -> None:
        """Raises UserError in every process unless all see the main one's `folder`, which is made if need be."""

    def whole(self, tree: Any) -> Any:
        """Returns a tree of arrays that are spread over processes whole (numpy) in each of them."""
        return tree

    def stop_together(self, step: int, requested: bool, name: str = "run") -> bool:
        """Returns whether all processes stop now, after `step` steps, because one of them was `requested` to. Called
        once a call's results were fetched and before the next call; `name` is the run's, where several go in turn."""
        return requested


_current = Host()


def current_host() -> Host:
    """Returns the processes of this run: a `Host` alone, or what `joined` has joined."""
    return _current


@contextlib.contextmanager
def joined(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> Iterator[Host]:
    """Joins the other processes of the run, if there are others, and ends in good order with them.

    Others are expected when arguments or RECOLLECT_COORDINATOR, RECOLLECT_PROCESSES and RECOLLECT_PROCESS name them, in
    a step of Slurm or Open MPI with several tasks, and on the hosts of a TPU slice. To be entered before any device is
    used. How an error ends a process among others: processes.py.

    Raises:
      UserError: impossible settings, a port that is taken, or a number that two processes have.
    """
    global _current
    arguments = (coordinator, processes, index)
    place = None
    if any(argument is not None for argument in arguments) or _in_cluster():
        from recollect.training.distributed.cluster import find_place

        place = find_place(*arguments)
    if place is None:
        yield _current
        return
    from recollect.training.distributed.processes import run_joined

    with run_joined(place) as host:
        _current = host
        try:
            yield host
        finally:
            _current = Host()


def _in_cluster() -> bool:
    """Returns whether the environment may name other processes; asks no server."""
    ours = ("RECOLLECT_COORDINATOR", "RECOLLECT_PROCESSES", "RECOLLECT_PROCESS")
    if any(os.environ.get(name) for name in (*ours, "SLURM_PROCID", "OMPI_MCA_orte_hnp_uri")):
        return True
    if os.environ.get("JAX_PLATFORMS", "tpu").partition(",")[0] != "tpu":
        return False
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm  # decided at jax's import; it has no public name

    return bool(running_in_cloud_tpu_vm)
