"""Intervals of means over seeds, of ratios over documents, of shares over examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

LEAST = 3
"""Seeds, or documents, below which there is no interval: points are shown instead."""
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


def ratio_interval(
    totals: Float[np.ndarray, " n"], sizes: Float[np.ndarray, " n"], level: float = 0.95
) -> tuple[float, float] | None:
    """Returns Student's interval of sum(totals) / sum(sizes) over n documents, whose tokens are not independent, with
    the ratio linearised; None for fewer than `LEAST` documents or where a total is NaN.

    Source: Cochran, Sampling Techniques (1977), chapter 6, without the correction for a finite population.
    """
    count = len(totals)
    if count < LEAST or np.isnan(totals).any():
        return None
    ratio = float(totals.sum() / sizes.sum())
    deviation = float(np.sqrt(count / (count - 1) * np.square(totals - ratio * sizes).sum()) / sizes.sum())
    half = float(stdtrit(count - 1, (1 + level) / 2)) * deviation
    return ratio - half, ratio + half


def share_interval(share: float, examples: float, level: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's interval of a share of `examples` that are right or wrong.

    It holds for a mean of shares within examples, too, where it is wider than need be: no mean of numbers from 0 to 1
    varies more than one of zeros and ones.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * examples)) / (1 + z * z / examples)
    half = z / (1 + z * z / examples) * math.sqrt(share * (1 - share) / examples + (z / (2 * examples)) ** 2)
    return max(centre - half, 0.0), min(centre + half, 1.0)
