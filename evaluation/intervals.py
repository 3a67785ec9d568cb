"""Bootstrap intervals of means over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

LEAST = 3
"""Seeds below which there is no interval: points are shown instead."""
ALL_RESAMPLES, RESAMPLES = 5**5, 10_000
"""Up to how many resamples all are formed; of more, how many are drawn."""


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Returns the percentile bootstrap interval of the mean; None for fewer than `LEAST` values or where one is NaN.

    Up to five values all resamples are formed, so the interval is exact; of more values they are drawn from one seed.
    Of three values it reaches from the least to the greatest.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    count = len(values)
    if count < LEAST or any(map(math.isnan, values)):
        return None
    if count**count <= ALL_RESAMPLES:
        chosen = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        chosen = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    means = np.asarray(values)[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)
