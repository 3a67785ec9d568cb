"""Dataset Decomposition: pieces as the published procedure cuts them, the draw of lengths, what is kept, and
Algorithm 1's order."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.configuration import UserError
from recollect.data.text.rows.curriculum import BucketSchedule
from recollect.data.text.rows.decomposed import Decomposed, DecomposedPlan, decompose
from tests.data.text.documents import CountedDocuments


def cut_one_by_one(length, low, high):
    """The procedure of the paper for one document, taking the longest bucket where a document is longer."""
    pieces, at = [], 0
    while length - at > 1:
        power = math.floor(math.log2(length - at - 1))
        if power < low:
            break
        power = min(power, high)
        pieces.append((at, power))
        at += 2**power + 1
    return pieces


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=20), st.integers(1, 4), st.integers(0, 3))
def test_pieces_are_those_of_the_published_procedure(lengths, low, more):
    documents, starts, powers = decompose(np.array(lengths), low, low + more, 0, randomise=False)
    for document, length in enumerate(lengths):
        own = documents == document
        assert list(zip(starts[own].tolist(), powers[own].tolist(), strict=True)) == cut_one_by_one(
            length, low, low + more
        )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 999), min_size=1, max_size=10), st.integers(0, 5))
def test_random_pieces_follow_one_another_and_only_long_documents_are_drawn_for(lengths, seed):
    low, high = 2, 5
    documents, starts, powers = decompose(np.array(lengths), low, high, seed, randomise=True)
    for document, length in enumerate(lengths):
        own = documents == document
        at = 0
        for start, power in zip(starts[own].tolist(), powers[own].tolist(), strict=True):
            assert start == at and low <= power <= high
            natural = math.floor(math.log2(length - at - 1))
            assert power == natural or natural > high
            at += 2**power + 1
        assert length - at - 1 < 2**low  # what is dropped


def test_beyond_the_longest_bucket_every_length_gets_the_same_tokens():
    powers = decompose(np.array([3_000_000, 2_000_000]), 5, 9, 0, randomise=True)[2]
    tokens = np.array([np.count_nonzero(powers == power) * 2.0**power for power in range(5, 10)])
    assert tokens / tokens.mean() == pytest.approx(np.ones(5), abs=0.06)
    plan = DecomposedPlan(np.array([3_000_000, 2_000_000]), 32, 512, 0, randomise=True)
    assert plan.facts()["retained_share"] > 0.9999 and plan.facts()["target_share"] > 0.98


def test_what_is_kept_is_told():
    plan = DecomposedPlan(np.array([10, 17, 5, 40]), 8, 16, 0)
    # 10: 8 + 1; 17: 16 + 1; 5: nothing; 40: too long for the buckets, so drawn for once or twice, then 16 or 8 as the
    # rest allows
    facts = plan.facts()
    rows = facts["rows_by_length"]
    kept = sum((int(length) + 1) * count for length, count in rows.items())
    assert (
        facts["retained_share"] == kept / 72 and facts["target_share"] == sum(int(a) * b for a, b in rows.items()) / 68
    )
    assert plan.spans(0, 0) == [(0, 0, 8)] and (1, 0, 16) in [plan.spans(1, row)[0] for row in range(plan.counts[1])]
    with pytest.raises(ValueError, match="powers of two"):
        DecomposedPlan(np.array([10]), 8, 12, 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=5), st.integers(1, 4), st.integers(0, 3))
def test_every_cycle_gives_its_share_of_every_bucket_without_replacement(counts, cycles, seed):
    if not any(counts):
        return
    rows = tuple(2 ** (len(counts) - 1 - group) for group in range(len(counts)))
    schedule = BucketSchedule(tuple(counts), rows, cycles, (1.0,) * len(counts), seed)
    total = sum(schedule.before(3 * cycles))
    drawn = [schedule.locate(number) for number in range(total)]
    for group in range(len(counts)):
        assert [index for found, index in drawn if found == group] == list(range(schedule.before(3 * cycles)[group]))
    for cycle in range(3 * cycles):
        begin, end = sum(schedule.before(cycle)), sum(schedule.before(cycle + 1))
        for group, count in enumerate(counts):
            given_here = sum(found == group for found, _ in drawn[begin:end])
            assert abs(given_here - count / (cycles * rows[group])) < 1


def test_odds_hold_until_a_bucket_is_empty_then_among_the_others():
    schedule = BucketSchedule((4000, 4000, 4000), (1, 1, 1), 2, (6.0, 3.0, 1.0), 0)
    first = [schedule.locate(number)[0] for number in range(6000)]
    start = np.bincount(first[:2500], minlength=3) / 2500
    assert start == pytest.approx([0.6, 0.3, 0.1], abs=0.04)
    short_ends = max(place for place, group in enumerate(first) if group == 0)
    after = first[short_ends + 1 : short_ends + 501]
    assert set(after) == {1, 2} and after.count(1) / 500 == pytest.approx(0.75, abs=0.06)
    middle_ends = max(place for place, group in enumerate(first) if group == 1)
    assert set(first[middle_ends + 1 :]) == {2}
    # The next cycle begins with short ones again.
    assert np.mean([schedule.locate(6000 + number)[0] == 0 for number in range(500)]) == pytest.approx(0.6, abs=0.07)


@pytest.mark.parametrize(
    ("curriculum", "odds"),
    [("uniform", (1, 1, 1)), ("grow_linear", (3, 2, 1)), ("grow_p2", (4, 2, 1)), ("grow_p100", (10000, 100, 1))],
)
def test_curricula(curriculum, odds):
    plan = DecomposedPlan(np.array([9, 9, 17, 33]), 8, 32, 0)
    assert Decomposed(shortest=8, curriculum=curriculum).shares(plan) == (8, odds)
    tokens = (16, 16, 32)
    by_tokens = Decomposed(shortest=8, curriculum=curriculum, cycles=3, odds="by_tokens").shares(plan)
    assert by_tokens == (3, tuple(a * b for a, b in zip(odds, tokens, strict=True)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decomposed(shortest=48), "shortest=48: must be a power of two, at least 2; the nearest is 32"),
        (lambda: Decomposed(cycles=0), "cycles=0"),
        (lambda: Decomposed(shortest=8).check(100), "length=100.*the nearest is 128"),
        (lambda: Decomposed(shortest=8).check(4), "sequences.shortest=8"),
        (
            lambda: Decomposed(shortest=8).plan(CountedDocuments([8, 3]).lengths, 16, 0),
            "no document has more tokens than that, the longest has 8",
        ),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
