"""Numbers that the processes of one run agree on. With one process every answer is its own.

Decisions that change what a process does next (stop, save, go back to a checkpoint) go through here or
`processes.stop_together`, so that
all processes take the same turn at the same step: one that alone left the loop would leave the others waiting in a
collective.
"""

from __future__ import annotations

from typing import Any

from recollect.training.distributed import processes


def largest(value: int) -> int:
    """The largest `value` that any process gives. Every process must call it, in the same order of calls; it waits
    for all."""
    return max(processes.gather(value))


def from_main(value: int) -> int:
    """What the main process gives as `value`; the others' is ignored. Every process must call it."""
    return int(processes.gather(value)[0])


def whole(tree: Any) -> Any:
    """A tree of arrays that are spread over processes, whole in each of them (numpy); as it is with one process.
    Every process must call it."""
    if processes.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
