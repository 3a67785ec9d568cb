"""Which bucket of rows a training run draws each batch from.

Buckets are drawn as Pouransari et al. (arXiv 2405.13226, Algorithm 1) do: each bucket's batches are divided equally
among cycles, and within a cycle a bucket is drawn with probability proportional to its odds among the buckets that the
cycle has not emptied yet. Odds don't change in a cycle, so short buckets that have high odds empty first and long ones
fill its end, and every cycle begins anew with short sequences.
"""

import bisect
import functools

import numpy as np

from recollect.data.text.rows.stable_random import uniforms

_CYCLES = 3


class BucketSchedule:
    """The group of rows that each batch takes, without end.

    By the end of cycle j, group g has given floor(j x) batches, x = rows / (rows per batch x cycles): each row once per
    epoch, shares of cycles equal up to one batch, nothing left over. A group's batches follow one another through its
    rows, epoch after epoch.

    Args:
      counts: rows of each group.
      rows: rows per batch of each group.
      cycles: cycles per epoch.
      odds: of each group while its share of the cycle lasts.
      seed: decides the draws.
    """

    def __init__(self, counts: tuple[int, ...], rows: tuple[int, ...], cycles: int, odds: tuple[float, ...], seed: int):
        self._counts, self._rows, self._cycles, self._odds, self._seed = counts, rows, cycles, odds, seed
        self._cycle = functools.lru_cache(maxsize=2)(self._draw)

    def locate(self, number: int) -> tuple[int, int]:
        """Returns (group, number of the batch within the group) of batch `number`."""
        cycle = self._cycle_of(number)
        groups, ranks = self._cycle(cycle)
        at = number - sum(self.before(cycle))
        group = int(groups[at])
        return group, self.before(cycle)[group] + int(ranks[at])

    def before(self, cycle: int) -> list[int]:
        """Returns how many batches each group gives before `cycle`."""
        return [cycle * count // (self._cycles * rows) for count, rows in zip(self._counts, self._rows, strict=True)]

    def _cycle_of(self, number: int) -> int:
        """Returns the last cycle with at most `number` batches before it."""
        low, high = 0, 1
        while sum(self.before(high)) <= number:
            low, high = high, 2 * high
        return low + bisect.bisect_right(range(low + 1, high), number, key=lambda cycle: sum(self.before(cycle)))

    def _draw(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Algorithm 1: returns the group of each batch of a cycle, and its number within the group and cycle."""
        sizes = np.array(self.before(cycle + 1)) - np.array(self.before(cycle))
        total = int(sizes.sum())
        numbers = uniforms((self._seed, _CYCLES, cycle), total)
        groups, ranks = np.empty(total, np.int16), np.empty(total, np.int64)
        at = 0
        while at < total:
            needs = sizes - np.bincount(groups[:at], minlength=len(sizes))
            open_groups = np.flatnonzero(needs)
            odds = np.array(self._odds)[open_groups]
            bounds = np.cumsum(odds / odds.sum())
            drawn = open_groups[np.minimum(np.searchsorted(bounds, numbers[at:], side="right"), len(open_groups) - 1)]
            # As far as the first group's end; from there on the odds are others.
            places = {int(group): np.flatnonzero(drawn == group) for group in open_groups}
            end = min(1 + int(of[needs[group] - 1]) for group, of in places.items() if len(of) >= needs[group])
            groups[at : at + end] = drawn[:end]
            at += end
        for group, size in enumerate(sizes):
            ranks[groups == group] = np.arange(size)
        return groups, ranks
