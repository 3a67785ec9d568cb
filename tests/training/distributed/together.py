"""A script for tests of training/distributed/processes.py: joins the others, then does what its first argument says."""

import argparse
import signal
import sys
import time
from pathlib import Path

from recollect.configuration import UserError
from recollect.training.distributed.host import Host, joined


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    given = parser.parse_args()
    asked_to_stop = []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    try:
        with joined(given.coordinator, given.processes, given.process) as host:
            act(host, given.what, given.folder, asked_to_stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def act(host: Host, what: str, folder: Path, asked_to_stop: list) -> None:
    import jax.numpy as jnp
    from jax.experimental.multihost_utils import process_allgather

    index = host.index
    if what == "differ":
        host.check_equal({"config": {"steps": [10, 20 + index]}})
    if what == "blind":
        host.check_shared(folder / str(index))
    host.check_equal({"config": {"steps": [10, 20]}})
    host.check_shared(folder / "shared")
    gathered = process_allgather(jnp.array([index]))
    print(f"ready, gathered {gathered.ravel().tolist()}", flush=True)
    if what == "wait":
        time.sleep(300)
    if what == "full disk" and index == 1:
        raise UserError("the disk is full")
    step = 0
    while what != "end":
        process_allgather(jnp.arange(2))
        time.sleep(0.02)
        step += 10
        if host.stop_together(step, bool(asked_to_stop)):
            print(f"stopped at step {step}", flush=True)
            break


main()
