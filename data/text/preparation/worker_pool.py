"""The tasks of a preparation in several processes.

Easy to get wrong:
- Workers are spawned, not forked (JAX runs threads), and import neither JAX nor Flax.
- A worker whose parent was killed would wait for work forever, so each ends with its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from recollect.configuration import UserError
from recollect.data.text.preparation.shards import ShardTask, write_shards


def run_tasks(tasks: list[ShardTask], processes: int) -> Iterator[dict[str, Any]]:
    """Does all tasks and yields their summaries as they are ready, in any order.

    Raises:
      UserError: a source can't be read, or a process was killed.
      OSError, RuntimeError, ValueError: the folder can't be written.
    """
    if processes == 1:
        yield from map(write_shards, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin_worker) as pool:
        try:
            for future in as_completed([pool.submit(write_shards, task) for task in tasks]):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (out of memory?); the same command continues, with fewer --processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which lets running tasks finish
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)
