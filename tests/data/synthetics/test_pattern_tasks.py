"""Recall in other patterns than causal self attention: labels follow from what is shown, wherever it is shown."""

import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.inspection import example
from recollect.data.synthetics import MaskedRecall, SourceCopying, SourceRecall, numpy_batch
from tests.data.synthetics.task_laws import (
    answers_are_equally_likely,
    labels_are_a_solvers,
    settings_are_kept_and_possible,
    streams_repeat_and_share_no_example,
)

MASKED = MaskedRecall(vocab_size=24, pairs=5)
RECALL = SourceRecall(vocab_size=64, pairs=9)
COPYING = {order: SourceCopying(symbols=30, length=8, order=order) for order in ("forward", "reversed")}


def masked_recall(task, tokens):
    shown = {}
    for key, value in zip(tokens[::2], tokens[1::2], strict=True):
        shown.setdefault(key, []).append(value)
    assert all(sorted(values)[0] == 0 < sorted(values)[1] for values in shown.values())  # hidden once
    assert len(shown) == len({max(values) for values in shown.values()}) == task.pairs
    return {at + 1: max(shown[key]) for at, key in enumerate(tokens) if at % 2 == 0 and tokens[at + 1] == 0}


def test_a_hidden_value_is_shown_on_either_side():
    labels_are_a_solvers(MASKED, masked_recall)
    settings_are_kept_and_possible(MASKED)
    streams_repeat_and_share_no_example(MASKED)
    half = MASKED.vocab_size // 2
    answers_are_equally_likely(MASKED, half, MASKED.vocab_size)
    positions = numpy_batch(MASKED, 0, 4000).target_positions
    assert np.mean(positions < 2 * MASKED.pairs) == pytest.approx(0.5, abs=0.02)
    places = np.bincount(positions.ravel(), minlength=4 * MASKED.pairs)[1::2]
    assert np.ptp(places) < 0.2 * places.mean()  # every pair's place hides as often


def test_the_source_holds_the_pairs_that_tokens_are_keys_of():
    batch = numpy_batch(RECALL, 3, 48)
    for source, tokens, targets in zip(batch.source, batch.tokens, batch.targets, strict=True):
        values = dict(zip(source[::2], source[1::2], strict=True))
        assert sorted(values) == sorted(tokens) and len(set(values.values())) == RECALL.pairs
        assert [values[token] for token in tokens] == targets.tolist()
        assert max(values) < RECALL.vocab_size // 2 <= min(values.values()) and max(values.values()) < RECALL.vocab_size
    assert (batch.target_positions == np.arange(RECALL.pairs)).all()
    settings_are_kept_and_possible(RECALL)
    streams_repeat_and_share_no_example(RECALL)
    answers_are_equally_likely(RECALL, RECALL.vocab_size // 2, RECALL.vocab_size)


@pytest.mark.parametrize("task", COPYING.values(), ids=COPYING)
def test_a_copy_follows_its_separator(task):
    batch = numpy_batch(task, 2, 48)
    assert (batch.targets == (batch.source if task.order == "forward" else batch.source[:, ::-1])).all()
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all() and not batch.tokens[:, 0].any()
    words = example(batch, 0).split()
    assert words[: task.length + 1] == [*map(str, batch.source[0]), "=>"]
    settings_are_kept_and_possible(task)
    streams_repeat_and_share_no_example(task)
    answers_are_equally_likely(task, 1, task.vocabulary)


@pytest.mark.parametrize("task", [MaskedRecall, SourceRecall])
def test_more_pairs_than_keys_are_refused(task):
    with pytest.raises(UserError, match="vocab_size=12: 6 pairs need at least 14"):
        task(vocab_size=12, pairs=6)
