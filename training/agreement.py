"""Numbers that the processes of one run agree on. With one process every answer is its own.

Decisions that change what a process does next (stop, save, go back to a checkpoint) go through here or `distributed.stop_together`, so that
all processes take the same turn at the same step: one that alone left the loop would leave the others waiting in a collective.
"""

from __future__ import annotations

from training import distributed


def largest(value: int) -> int:
    """The largest `value` that any process gives. Every process must call it, in the same order of calls; it waits for all."""
    return max(distributed.gather(value))


def from_main(value: int) -> int:
    """What the main process gives as `value`; the others' is ignored. Every process must call it."""
    return int(distributed.gather(value)[0])
