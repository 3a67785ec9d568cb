"""How documents become training rows: the configs of the three ways, and which buckets of rows a training run draws
when.

    Packed()        whole documents share rows, each a segment that attends to itself alone (data/text/rows/packed.py)
    Chunked()       all documents in one stream, cut into rows (data/text/rows/chunked.py)
    Decomposed()    each document cut into power-of-two pieces, batches of one length at a time (data/text/rows/decomposed.py)

Rows that all have one length are drawn in an order of their own each epoch. Buckets are drawn as Pouransari et al.
(arXiv 2405.13226, Algorithm 1) do: each bucket's batches are shared out equally over cycles, and within a cycle a
bucket is drawn with probability proportional to its odds among the buckets that the cycle has not emptied yet. Odds
don't change in a cycle, so short buckets that have high odds empty first and long ones fill its end, and every cycle
begins anew with short sequences.
"""

from __future__ import annotations

import functools
from typing import Literal

import chz
import numpy as np

from recollect.configuration import Config, UserError
from recollect.data.text.rows.base import Plan
from recollect.data.text.rows.chunked import ChunkedPlan
from recollect.data.text.rows.decomposed import DecomposedPlan
from recollect.data.text.rows.packed import PackedPlan
from recollect.data.text.rows.stable_random import uniforms

Curriculum = Literal["uniform", "grow_linear", "grow_p2", "grow_p100"]
_CYCLES = 3


@chz.chz(typecheck=True)
class Sequences(Config):
    """Base of the three ways."""

    def check(self, length: int) -> None:
        """Raises UserError if rows of `length` tokens cannot be made this way."""

    def plan(self, lengths: np.ndarray, length: int, seed: int) -> Plan:
        """The rows of documents of `lengths` tokens each."""
        raise NotImplementedError

    def shares(self, plan: Plan) -> tuple[int, tuple[float, ...]]:
        """Cycles that an epoch is divided into, and the odds of each group of rows."""
        return 1, (1.0,) * len(plan.lengths)


@chz.chz(typecheck=True)
class Packed(Sequences):
    """Whole documents in rows, kept apart by segment ids; positions restart with each document."""

    def plan(self, lengths: np.ndarray, length: int, seed: int) -> Plan:
        return PackedPlan(lengths, length)


@chz.chz(typecheck=True)
class Chunked(Sequences):
    """Documents in one stream, cut into rows. `document_mask` keeps documents within a row apart; without it they
    attend to each other."""

    document_mask: bool = True

    def plan(self, lengths: np.ndarray, length: int, seed: int) -> Plan:
        return ChunkedPlan(lengths, length, seed, document_mask=self.document_mask)


@chz.chz(typecheck=True)
class Decomposed(Sequences):
    """Dataset Decomposition; the longest bucket is the data's `length`, a power of two.

    Attributes:
      shortest: inputs of the shortest bucket, a power of two; rests of documents that are shorter are dropped.
      curriculum: odds from the shortest to the longest of n buckets: "uniform" 1:1:...:1, "grow_linear" n:...:2:1,
        "grow_p2" 2^(n-1):...:2:1, "grow_p100" 100^(n-1):...:100:1 (powers of 100, as its name says).
      cycles: cycles in an epoch. The paper counts them in a whole run: a run of a tenth of an epoch sees eight of them
        with cycles=80.
      odds: "raw" as the paper's Algorithm 1; "by_tokens" multiplies by each bucket's tokens as the authors' code does.
        (They agree where all buckets hold the same number of tokens.)
      randomise: cut documents beyond the longest bucket into pieces of random length, not into longest ones.
    """

    shortest: int = 256
    curriculum: Curriculum = "grow_p2"
    cycles: int = 8
    odds: Literal["raw", "by_tokens"] = "raw"
    randomise: bool = True

    @chz.validate
    def _ranges(self) -> None:
        if self.shortest < 2 or self.shortest & (self.shortest - 1):
            raise UserError(
                f"shortest={self.shortest}: must be a power of two, at least 2; the nearest is {_nearest_power(self.shortest)}"
            )
        if self.cycles < 1:
            raise UserError(f"cycles={self.cycles}: must be at least 1")

    def check(self, length: int) -> None:
        """Raises UserError if `length` is no power of two or shorter than the shortest bucket."""
        if length & (length - 1):
            raise UserError(
                f"length={length}: Decomposed has buckets of powers of two, and the longest is `length`; the nearest is {_nearest_power(length)}"
            )
        if length < self.shortest:
            raise UserError(
                f"length={length}: the longest bucket is shorter than the shortest, sequences.shortest={self.shortest}"
            )

    def plan(self, lengths: np.ndarray, length: int, seed: int) -> Plan:
        plan = DecomposedPlan(lengths, self.shortest, length, seed, randomise=self.randomise)
        if not any(plan.counts):
            raise UserError(
                f"sequences.shortest={self.shortest}: no document has more tokens than that, the longest has {int(max(lengths))}"
            )
        return plan

    def shares(self, plan: Plan) -> tuple[int, tuple[float, ...]]:
        last = len(plan.lengths) - 1
        raw = {
            "uniform": lambda place: 1.0,
            "grow_linear": lambda place: last - place + 1.0,
            "grow_p2": lambda place: 2.0 ** (last - place),
            "grow_p100": lambda place: 100.0 ** (last - place),
        }[self.curriculum]
        weights = (
            [1] * len(plan.lengths)
            if self.odds == "raw"
            else [a * b for a, b in zip(plan.lengths, plan.counts, strict=True)]
        )
        return self.cycles, tuple(raw(place) * weight for place, weight in enumerate(weights))


class Schedule:
    """Which group of rows each batch takes, for ever.

    By the end of cycle j, group g has given floor(j x) batches, x = rows / (rows a batch x cycles): each row once an
    epoch, shares of cycles equal up to one batch, nothing left over. A group's batches follow one another through its
    rows, epoch after epoch.

    Args:
      counts: rows of each group.
      rows: rows a batch of each group.
      cycles: an epoch's.
      odds: of each group while its share of the cycle lasts.
      seed: decides the draws.
    """

    def __init__(self, counts: tuple[int, ...], rows: tuple[int, ...], cycles: int, odds: tuple[float, ...], seed: int):
        self._counts, self._rows, self._cycles, self._odds, self._seed = counts, rows, cycles, odds, seed
        self._cycle = functools.lru_cache(maxsize=2)(self._draw)

    def locate(self, number: int) -> tuple[int, int]:
        """(group, number of the batch within the group) of batch `number`."""
        cycle = self._cycle_of(number)
        groups, ranks = self._cycle(cycle)
        place = number - sum(self.before(cycle))
        group = int(groups[place])
        return group, self.before(cycle)[group] + int(ranks[place])

    def before(self, cycle: int) -> list[int]:
        """Batches that each group gives before `cycle`."""
        return [cycle * count // (self._cycles * rows) for count, rows in zip(self._counts, self._rows, strict=True)]

    def _cycle_of(self, number: int) -> int:
        """The last cycle with no more than `number` batches before it."""
        low, high = 0, 1
        while sum(self.before(high)) <= number:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self.before(middle)) <= number else (low, middle)
        return low

    def _draw(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Algorithm 1: group of each batch of a cycle, and how many of that group came before it in the cycle."""
        left = np.array(self.before(cycle + 1)) - np.array(self.before(cycle))
        total = int(left.sum())
        drawn = uniforms((self._seed, _CYCLES, cycle), total)
        groups = np.empty(total, np.int16)
        ranks = np.empty(total, np.int64)
        given = np.zeros(len(left), np.int64)
        at = 0
        while at < total:
            open_groups = np.flatnonzero(left > given)
            odds = np.array(self._odds)[open_groups]
            bounds = np.cumsum(odds / odds.sum())
            found = open_groups[np.minimum(np.searchsorted(bounds, drawn[at:], side="right"), len(open_groups) - 1)]
            # As far as the first group's end; from there on the odds are others.
            places = {int(group): np.flatnonzero(found == group) for group in open_groups}
            needs = {group: int(left[group] - given[group]) for group in places}
            end = min(int(places[group][need - 1]) + 1 for group, need in needs.items() if len(places[group]) >= need)
            for group, found_at in places.items():
                taken = found_at[: np.searchsorted(found_at, end)]
                ranks[at + taken] = given[group] + np.arange(len(taken))
                given[group] += len(taken)
            groups[at : at + end] = found[:end]
            at += end
        return groups, ranks


def _nearest_power(number: int) -> int:
    """The power of two, at least 2, nearest to a number."""
    below = 1 << max(number, 2).bit_length() - 1
    return below if number - below <= 2 * below - number else 2 * below
