"""What runs are ranked by: names, axis labels, scale and direction, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """Holds what a table or a figure needs to know of a metric.

    Attributes:
      label: of an axis.
      header: of a column.
      by_slice: entry of result.json that has it by slice.
      percent: shown in percent, a share of 0 to 1 of which more is better; else a number of which less is better.
    """

    label: str
    header: str
    by_slice: str
    percent: bool

    @property
    def scale(self) -> float:
        """What values are multiplied by where they are shown."""
        return 100.0 if self.percent else 1.0

    def text(self, value: float) -> str:
        """Formats a value without its unit; '-' for NaN."""
        if math.isnan(value):
            return "-"
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"

    def rank(self, value: float) -> tuple[bool, float]:
        """Returns a sort key that puts the best value first and NaN last."""
        return (True, 0.0) if math.isnan(value) else (False, -value if self.percent else value)


METRICS = {
    "accuracy": Metric("Accuracy (%)", "accuracy %", "accuracy_by_slice", percent=True),
    "exact": Metric("Answers right as a whole (%)", "exact %", "exact_by_slice", percent=True),
    "bits_per_byte": Metric("Bits per byte", "bits/byte", "bits_by_slice", percent=False),
    "bits_per_token": Metric("Bits per token", "bits/token", "bits_by_slice", percent=False),
}
"""By name. A result or evaluation without "metric" is ranked by the first that it has."""


def metric_of(values: Mapping[str, Any]) -> str | None:
    """Returns the name of the metric by which a result, or one evaluation, is ranked; None where it has none."""
    stated = values.get("metric")
    return stated if stated in METRICS else next((name for name in METRICS if name in values), None)
