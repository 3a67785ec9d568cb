"""What happens to the learning rate where a run goes on with another number of steps than it began with."""

from __future__ import annotations

from typing import Any, cast

from recollect.training.optimizer import Optimizer

NOTICED = 1e-3
"""Smallest change that is reported, as a share of the peak."""


def rate_change(optimizer: Optimizer, step: int, before: int, now: int) -> str | None:
    """Returns what the learning rate does at `step`, in a line, where a run of `before` steps becomes one of `now`.

    None: it stays what it would have been, as with a schedule that is constant there.
    """
    peak, rate = optimizer.learning_rate, cast(Any, optimizer.rate)  # of numbers, not of traced arrays
    old, new = (float(rate(step, steps, peak)) for steps in (before, now))
    if abs(new - old) <= NOTICED * peak:
        return None
    name = optimizer.schedule
    moved = f"{'rises again' if new > old else 'falls'} from {old:.4g} to {new:.4g}"
    ended = f"had ended at step {before:,}" if step >= before else f"was over {before:,} steps"
    line = f"the learning rate {moved}: {name} {ended} and is now over {now:,}"
    if name == "wsd":
        stable = int(before * (1 - optimizer.decay_share))
        return f"{line}; from a checkpoint before its decay (step {stable:,}) it would have stayed {peak:.4g}"
    return f"{line}; optimizer.schedule=wsd (warmup, stable, decay) extends without that, from before its decay"
