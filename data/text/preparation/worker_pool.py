"""Tasks of a preparation in several processes, and how far they are.

Easy to get wrong:
- Workers are spawned, not forked (JAX runs threads), and import neither JAX nor Flax.
- A worker whose parent was killed would wait for work for ever; it watches for that and ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from recollect.configuration import UserError
from recollect.data.text.preparation.manifest import SPLITS
from recollect.data.text.preparation.shards import Job, write_part

_WATCH_SECONDS = 0.5
_LINE_SECONDS = 5.0


def work(jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Does all jobs; yields their facts as they are ready, in any order.

    Raises:
      UserError: a source can't be read, or a process was killed.
      OSError: the folder can't be written.
    """
    if processes == 1:
        yield from map(write_part, jobs)
        return
    waiting = list(reversed(jobs))
    running: set[Future[dict[str, Any]]] = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin_worker, (os.getpid(),)) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < 2 * processes:
                    running.add(pool.submit(write_part, waiting.pop()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (out of memory?); the same command goes on, with fewer --processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which lets running tasks finish

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """A bar on a terminal, else a line every few seconds; at the end, tokens a second.

    Args:
      jobs: how many there are in all.
      missing: those that are to be done.
      say: is told the lines.
    """

    def __init__(self, jobs: int, missing: list[Job], say: Callable[[str], None]):
        from tqdm import tqdm

        self._say, self._shards, self._count = say, jobs - len(missing), jobs
        self._size = sum(unit.size for job in missing for unit in job.units)
        self._done, self._tokens = 0, 0
        self._began = self._told = time.monotonic()
        self._bar = tqdm(
            total=self._size, unit="B", unit_scale=True, desc="prepare", disable=not sys.stderr.isatty(), leave=False
        )

    def add(self, facts: dict[str, Any]) -> None:
        """Counts a job that is done."""
        self._shards += 1
        self._done += facts["source_bytes"]
        self._tokens += sum(facts[split]["tokens"] for split in SPLITS)
        self._bar.update(facts["source_bytes"])
        if self._bar.disable and time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            self._say(
                f"{self._shards} of {self._count} shards, {self._done / 1e6:,.0f} of {self._size / 1e6:,.0f} MB, {self._speed()}"
            )

    def _speed(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._began, 1e-9):,.0f} tokens a second"

    def close(self) -> None:
        """Clears the bar and says how fast it went."""
        self._bar.close()
        if self._tokens:
            self._say(f"{self._tokens:,} tokens in {time.monotonic() - self._began:,.1f} s: {self._speed()}")
