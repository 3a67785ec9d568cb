"""Loss-spike detection, after which a run goes back to its last good checkpoint.

A loss is a spike when it lies more than `threshold` deviations above the median of the last `window` losses. The
deviation is the median absolute one times 1.4826 (the standard deviation of a normal sample; Rousseeuw & Croux 1993),
at least 1% of the median, so that neither an earlier spike nor a very steady loss distorts it. Plain Python numbers:
the same losses give the same answers everywhere.
"""

from __future__ import annotations

import collections
import math
import statistics
from typing import Any

import chz

from recollect.configuration import Config, UserError

NORMAL = 1.4826
"""Standard deviation of a normal sample over its median absolute deviation."""

LEAST_DEVIATION = 0.01
"""Smallest deviation, as a share of the median."""


@chz.chz(typecheck=True)
class Spikes(Config):
    """When a jump of the loss sends a run back to its last good checkpoint, past the data that caused it.

    Attributes:
      window: how many of the last losses are compared with; no loss is a spike before there are so many.
      threshold: deviations above their median that make a spike.
      warmup: first step at which there may be a spike (the first losses of a run fall and jump).
      most: rollbacks of one run; later spikes are ignored.
    """

    window: int = 50
    threshold: float = 10.0
    warmup: int = 100
    most: int = 3

    @chz.validate
    def _ranges(self) -> None:
        if self.window < 5:
            raise UserError(f"spikes.window={self.window}: a median and its deviation need at least 5 losses")
        if not 1 <= self.threshold < math.inf:
            raise UserError(f"spikes.threshold={self.threshold}: must be at least 1 deviation")
        for name in ("warmup", "most"):
            if getattr(self, name) < 0:
                raise UserError(f"spikes.{name}={getattr(self, name)}: must not be negative")


class LossSpikeDetector:
    """Watches the losses of one run.

    After a rollback the losses of the steps that are done again take the place of the old ones: `observe` forgets those
    at and after its step. The count of rollbacks is kept, so a guard lives on through rollbacks and its state belongs
    into the checkpoints.
    """

    def __init__(self, config: Spikes):
        self.config = config
        self.set_state(None)

    def observe(self, step: int, loss: float) -> bool:
        """Returns whether the loss of a step is a spike, so that the run should roll back; counts the rollback.

        Losses that are not finite are left to the step, which skips them.
        """
        if not math.isfinite(loss):
            return False
        while self._seen and self._seen[-1][0] >= step:
            self._seen.pop()
        spike = step >= self.config.warmup and self.rollbacks < self.config.most and loss > self.limit()
        if spike:
            self.rollbacks += 1
        else:
            self._seen.append((step, float(loss)))
        return spike

    def limit(self) -> float:
        """Returns the loss above which the next one is a spike; infinite while there are too few before it."""
        if len(self._seen) < self.config.window:
            return math.inf
        losses = [loss for _, loss in self._seen]
        median = statistics.median(losses)
        spread = statistics.median(abs(loss - median) for loss in losses)
        return median + self.config.threshold * max(NORMAL * spread, LEAST_DEVIATION * abs(median))

    def state(self) -> dict[str, Any]:
        """Returns what `set_state` takes, JSON-ready."""
        return {"rollbacks": self.rollbacks, "seen": [[step, loss] for step, loss in self._seen]}

    def set_state(self, state: dict[str, Any] | None) -> None:
        """Goes on from what `state` returned; None (a checkpoint without one) starts afresh."""
        state = state or {"rollbacks": 0, "seen": []}
        self.rollbacks: int = state["rollbacks"]
        self._seen = collections.deque(map(tuple, state["seen"]), self.config.window)
