"""Best-fit packing: the same rows as piece by piece, each piece once, and full rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.data.text.rows.packed import PackedPlan, pack


def pack_one_by_one(sizes, length):
    """Each row takes the longest piece left that fits, again and again; among equally long ones the first."""
    left = sorted(range(len(sizes)), key=lambda piece: (-sizes[piece], piece))
    rows = []
    while left:
        room, row = length, []
        while fitting := [piece for piece in left if sizes[piece] <= room]:
            row.append(fitting[0])
            left.remove(fitting[0])
            room -= sizes[fitting[0]]
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 20))
def test_rows_are_those_of_packing_one_by_one(sizes, length):
    rows = pack(np.array(sizes, np.int64), length)
    assert [rows.pieces(row).tolist() for row in range(len(rows))] == pack_one_by_one(sizes, length)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(2, 40))
def test_each_token_of_each_document_lies_in_one_row(lengths, length):
    plan = PackedPlan(np.array(lengths), length)
    seen = []
    for row in range(plan.counts[0]):
        spans = plan.spans(0, row)
        assert sum(stop - start for _, start, stop in spans) <= length
        seen += [(document, token) for document, start, stop in spans for token in range(start, stop)]
    assert sorted(seen) == [(document, token) for document, size in enumerate(lengths) for token in range(size)]


def test_a_million_pieces_are_packed_at_once_and_fill_rows():
    sizes = np.random.default_rng(0).integers(1, 513, 1_000_000)
    rows = pack(sizes, 512)
    assert np.bincount(rows.order, minlength=len(sizes)).max() == 1 == np.bincount(rows.order).min()
    loads = np.add.reduceat(sizes[rows.order], rows.begin[:-1])
    assert loads.max() <= 512 and loads.mean() / 512 > 0.99


def test_edges():
    assert pack(np.array([3, 3, 3, 5]), 8).order.tolist() == [3, 0, 1, 2]
    assert len(pack(np.zeros(0, int), 8)) == 0 and PackedPlan(np.zeros(0, int), 8).counts == (0,)
    with pytest.raises(ValueError, match="sizes"):
        pack(np.array([9]), 8)
    with pytest.raises(ValueError, match="length=0"):
        pack(np.array([9]), 0)
