"""Batches by number: each row once per epoch, constant tokens, any split over processes, targets within documents."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.configuration import UserError
from recollect.data.text.rows import Chunked, Decomposed, Packed, Streams
from recollect.data.text.rows.by_number import GlobalBatches
from tests.data.text.documents import CountedDocuments

LENGTH = 16
WAYS = [
    Packed(),
    Chunked(),
    Chunked(document_mask=False),
    Decomposed(shortest=4, cycles=2),
    Decomposed(shortest=4, odds="by_tokens"),
]


def make(lengths, way, *, batch_size=3, seed=0, shuffle=True, length=LENGTH):
    documents = CountedDocuments(lengths)
    plan = way.plan(documents.lengths, length, seed)
    return GlobalBatches(documents, plan, way, length=length, batch_size=batch_size, seed=seed, shuffle=shuffle)


lengths_of_documents = st.lists(st.integers(1, 90), min_size=1, max_size=25).filter(lambda lengths: max(lengths) > 4)


@pytest.mark.parametrize("way", WAYS, ids=repr)
@settings(deadline=None, max_examples=12)
@given(lengths=lengths_of_documents, seed=st.integers(0, 9), batch_size=st.integers(1, 5))
def test_targets(way, lengths, seed, batch_size):
    """Each follows its token within a document, and none comes twice in an epoch; all come but in Decomposed."""
    batches = make(lengths, way, batch_size=batch_size, seed=seed)
    plan = batches.plan
    seen = collections.Counter()
    for group in range(len(plan.lengths)):
        for row in range(plan.counts[group]):
            spans = plan.spans(group, row)
            assert sum(stop - start for _, start, stop in spans) <= plan.lengths[group]
    rows_left = {(group, row) for group in range(len(plan.counts)) for row in range(plan.counts[group])}
    number = 0
    while rows_left:
        group, index = batches._locate(number)
        for place in range(batches.rows(number)):
            at = index * batches.rows(number) + place
            if at < plan.counts[group]:
                rows_left.remove((group, batches._row(group, at)))
                batch = batches.read(number, place, place + 1)
                labelled = batch.weights[0] > 0
                assert (batch.targets[0][labelled] == batch.tokens[0][labelled] + 1).all()
                assert (batch.targets[0][labelled] % 1000 != 0).all() and not batch.targets[0][~labelled].any()
                seen.update(batch.targets[0][labelled].tolist())
                if batch.segments is not None:
                    for segment in set(batch.segments[0].tolist()) - {0}:
                        assert len(set((batch.tokens[0][batch.segments[0] == segment] // 1000).tolist())) == 1
                else:
                    assert not plan.segmented
        assert batches.rows(number) * batches.row_length(number) == batch_size * LENGTH
        number += 1
    assert not seen or max(seen.values()) == 1
    possible = {1000 * document + token for document, size in enumerate(lengths) for token in range(1, size)}
    assert set(seen) <= possible
    if isinstance(way, Decomposed):
        assert len(seen) == round(plan.facts()["target_share"] * len(possible))
    else:
        assert set(seen) == possible


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_a_batch_is_the_same_from_any_number_of_processes_and_starts(way):
    lengths = np.random.default_rng(1).integers(1, 100, 40)
    batches = make(lengths, way, batch_size=4)
    again = make(lengths, way, batch_size=4)
    other = make(lengths, way, batch_size=4, seed=1)
    differ = 0
    for number in (77, 0, 3, 200, 4):
        rows = batches.rows(number)
        whole = batches.read(number, 0, rows)
        for processes in (2, 4):
            share = rows // processes
            parts = [again.read(number, share * process, share * (process + 1)) for process in range(processes)]
            for name in ("tokens", "targets", "weights", "segments"):
                if getattr(whole, name) is not None:
                    joined = np.concatenate([getattr(part, name) for part in parts])
                    assert (joined == getattr(whole, name)).all() and joined.shape == (rows, batches.row_length(number))
        if (
            other.row_length(number) != batches.row_length(number)
            or not (other.read(number, 0, rows).tokens == whole.tokens).all()
        ):
            differ += 1
    assert differ >= 4
    with pytest.raises(ValueError, match="rows 0 to"):
        batches.read(0, 0, batches.rows(0) + 1)


def test_epochs_differ_in_order_alone_and_without_shuffling_not_at_all():
    lengths = np.random.default_rng(2).integers(1, 100, 60)
    for shuffle in (True, False):
        batches = make(lengths, Packed(), batch_size=1, shuffle=shuffle)
        rows = batches.plan.counts[0]
        epochs = [
            [batches.read(epoch * rows + row, 0, 1).tokens.tobytes() for row in range(rows)] for epoch in range(3)
        ]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
        assert (epochs[0] != epochs[1] != epochs[2]) == shuffle


def test_the_order_is_pinned():
    """A run that goes on under another version of NumPy or Grain must see the batches it would have seen."""
    batches = make([30, 50, 7, 80, 64, 21], Decomposed(shortest=4, cycles=2), batch_size=2, seed=5)
    assert [batches.row_length(number) for number in range(10)] == [16, 8, 16, 8, 4, 16, 8, 4, 16, 8]
    assert batches.read(3, 0, 2).tokens[:, 0].tolist() == [4028, 3069]
    for way, tokens in ((Packed(), [0, 3064]), (Chunked(), [1000, 4057])):
        batches = make([30, 50, 7, 80, 64, 21], way, batch_size=2, seed=5)
        assert batches.read(9, 0, 2).tokens[:, 0].tolist() == tokens


def test_chunked_rows_are_full_and_go_on_in_the_next():
    batches = make([5, 40, 3, 33, 2], Chunked(), batch_size=1, shuffle=False)
    rows = [batches.read(number, 0, 1) for number in range(batches.plan.counts[0])]
    stream = np.concatenate([row.tokens[0][row.segments[0] > 0] for row in rows])
    assert len(stream) == 83 and all((row.segments[0] > 0).all() for row in rows[:-1])
    starts = np.flatnonzero(stream % 1000 == 0)
    assert sorted((stream[starts] // 1000).tolist()) == [0, 1, 2, 3, 4]
    assert batches.plan.facts()["documents_cut"] >= 2
    assert make([5, 40], Chunked(document_mask=False), batch_size=1).read(0, 0, 1).segments is None


def test_an_empty_corpus_is_refused():
    for way in (Packed(), Chunked()):
        with pytest.raises(UserError, match="no training documents"):
            make([], way)


def test_streams_go_on_from_batch_to_batch_and_begin_again():
    batches = make([5, 40, 3, 33, 2], Streams(), batch_size=2)
    rows, length = batches.plan.counts[0], batches.plan.lengths[0]
    streams = [batches.read(number, 0, 2) for number in range(rows // 2 + 1)]
    for before, after in itertools.pairwise(streams[:-1]):
        inside = before.weights[:, -1] > 0
        np.testing.assert_array_equal(before.targets[inside, -1], after.tokens[inside, 0])
    np.testing.assert_array_equal(streams[-1].tokens, streams[0].tokens)
    tokens = np.concatenate([batch.tokens for batch in streams[:-1]], axis=1)
    assert len(np.unique(tokens)) == tokens.size == 83 // length // 2 * 2 * length and streams[0].segments is None
    with pytest.raises(UserError, match=r"run.batch_size=99: needs as many streams"):
        make([5, 40, 3, 33, 2], Streams(), batch_size=99)
