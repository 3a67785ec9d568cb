"""Several processes that train one run: joining them, what they agree on, stopping together, and how they end.

The engine is jax.distributed. Processes run the same program over the devices of all; process 0 alone prints and writes
the run's files (arrays of checkpoints are written by all). See docs/clusters.md.

Small values go through the key-value store of jax's coordination service: multihost_utils' broadcast and allgather are
programs of the devices, which hold arrays of one shape, have no timeout, and would wait for the steps in flight, where
`stop_together` must not. Its assert_equal raises in some processes only, and does not name what differs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import secrets
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from recollect.configuration import UserError
from recollect.configuration.io import flatten
from recollect.training.distributed.cluster import PEER_TIMEOUT, START_TIMEOUT, Place, check_port, seconds
from recollect.training.distributed.heartbeat import ROOT, Watch
from recollect.training.distributed.host import Host

_COMMUNICATION = re.compile(
    r"gloo|nccl|collective|connection|socket|unavailable|deadline_exceeded|barrier|coordination|heartbeat", re.I
)


class Processes(Host):
    """This process among the others of `place`, once it has joined them.

    Raises:
      UserError: a port that is taken, or a number that two processes have.
    """

    def __init__(self, place: Place):
        timeout = seconds("RECOLLECT_PEER_TIMEOUT", PEER_TIMEOUT)
        patience = seconds("RECOLLECT_START_TIMEOUT", START_TIMEOUT)
        self.index, self.count = place.index, place.processes
        self._patience = int(1000 * patience)  # milliseconds
        self._numbers = itertools.count()  # all ask the same questions in the same order, so they number them alike
        if self.is_main:
            check_port(place.coordinator)
        self.watch = Watch(place, timeout)
        # The service behind it would catch SIGTERM for itself; `stop_together` is what decides here.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.index,
            initialization_timeout=int(patience),
            heartbeat_timeout_seconds=int(1.5 * timeout),
            shutdown_timeout_seconds=60,
        )
        from jax._src import distributed  # the key-value store has no public name; Orbax takes this one too

        state: Any = distributed.global_state
        self._client = state.client
        try:
            self._client.key_value_set(f"{ROOT}/host/{self.index}", socket.gethostname())
        except Exception as error:
            raise UserError(
                f"two processes were started as --process {self.index}; each needs a number of its own"
            ) from error
        self.watch.begin(self._client, self._read_all(f"{ROOT}/host"))

    def _read_all(self, key: str) -> list[str]:
        """Returns what each process has set, or sets yet, at `key`/its number."""
        return [self._client.blocking_key_value_get(f"{key}/{one}", self._patience) for one in range(self.count)]

    def gather(self, value: Any) -> list[Any]:
        """Returns the `value` (JSON-ready) of every process, in their order."""
        key = f"{ROOT}/gather/{next(self._numbers)}"
        self._client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        texts = self._read_all(key)
        self._client.wait_at_barrier(key, self._patience)  # nobody ends upon an error before all have read
        return [json.loads(text) for text in texts]

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def largest(self, value: int) -> int:
        return max(self.gather(value))

    def wait_for_all(self) -> None:
        self.gather(0)

    def check_equal(self, facts: dict[str, Any]) -> None:
        first, *others = [flatten(other) for other in self.gather(facts)]
        for index, other in enumerate(others, 1):
            for path in sorted(first.keys() | other.keys()):
                if first.get(path) != other.get(path):
                    raise UserError(
                        f"the processes do not run the same thing: {path} is {first.get(path)!r} in "
                        f"{self.watch.name_of(0)} and {other.get(path)!r} in {self.watch.name_of(index)}"
                    )

    def check_shared(self, folder: Path) -> None:
        name = f".seen-by-all-{secrets.token_hex(8)}"
        if self.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
            except OSError as error:
                raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        name = self.broadcast(name)
        deadline = time.monotonic() + 5  # network file systems show new files late
        while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        blind = [index for index, sees in enumerate(self.gather(seen)) if not sees]
        if self.is_main:
            (folder / name).unlink(missing_ok=True)
        self.wait_for_all()  # the folder is as it was before anyone goes on
        if blind:
            raise UserError(
                f"{self.watch.name_of(blind[0])} does not see the run folder {folder.absolute()} of process 0; "
                "run.directory must be on a file system that all hosts share"
            )

    def whole(self, tree: Any) -> Any:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tree, tiled=True)

    def stop_together(self, step: int, requested: bool, name: str = "run") -> bool:
        # A process that was asked to stop writes down its step and goes on for one more call. The others cannot finish
        # that call without it, so at its end all have seen the note, and all stop there.
        folder = f"{ROOT}/stop/{name.replace('/', ':')}"
        if requested:
            with contextlib.suppress(Exception):  # another process wrote first: its step counts
                self._client.key_value_set(f"{folder}/step", str(step), allow_overwrite=False)
        return any(step > int(noted) for _, noted in self._client.key_value_dir_get(folder))

    def finish(self) -> None:
        """Ends together with all others; from here on none is watched."""
        self._client.wait_at_barrier(f"{ROOT}/end", self._patience)
        self.watch.close()
        jax.distributed.shutdown()


@contextlib.contextmanager
def run_joined(place: Place) -> Iterator[Processes]:
    """Joins the processes of `place`, then does whatever is inside, then ends all in good order.

    An error inside ends this process at once (Python's own way out would wait for the others at jax's barrier) and
    leaves the others a note of why: exit code 2 after a UserError, 130 after Ctrl-C, 75 when another process is gone,
    1 otherwise.
    """
    host = Processes(place)
    watch = host.watch
    try:
        yield host
        host.finish()
    except UserError as error:
        line = " ".join(str(error).split())
        watch.leave(2, line, f"error: process {host.index} of {host.count}: {line}")
    except KeyboardInterrupt:
        line = f"process {host.index} stopped; the same commands go on from the last checkpoint"
        watch.leave(130, "stopped by its user", line)
    except BaseException as error:
        if _COMMUNICATION.search(f"{type(error).__name__} {error}"):
            watch.failed(error)
        traceback.print_exc()
        watch.leave(1, f"{type(error).__name__}: {error}")
