"""Recall tasks whose labels a solver finds (recall_solvers.py): variants of MQAR, joint recall, MAD and its score."""

import jax
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.synthetics import (
    AskedFirstMQAR,
    CompositionalMQAR,
    Compression,
    ForgettingMQAR,
    FuzzyRecall,
    FuzzySlice,
    InContextRecall,
    JointRecall,
    Memorization,
    NoisyMQAR,
    mad,
    mad_score,
    mad_settings,
)
from recollect.data.synthetics.mad import MAD
from recollect.data.synthetics.memorization import values_of_keys
from tests.data.synthetics import recall_solvers
from tests.data.synthetics.task_laws import (
    answers_are_equally_likely,
    drawn,
    labels_are_a_solvers,
    settings_are_kept_and_possible,
    streams_repeat_and_share_no_example,
)


def memorization(task, tokens):
    values = values_of_keys(task.vocab_size, task.facts).tolist()
    assert len(set(values)) == len(values)
    return recall_solvers.memorization(task, tokens, values)


SOLVERS = {
    AskedFirstMQAR: recall_solvers.asked_first_mqar,
    CompositionalMQAR: recall_solvers.compositional_mqar,
    Compression: lambda task, tokens: dict(enumerate(tokens)),
    ForgettingMQAR: recall_solvers.forgetting_mqar,
    FuzzyRecall: recall_solvers.fuzzy_recall,
    InContextRecall: recall_solvers.in_context_recall,
    JointRecall: recall_solvers.joint_recall,
    Memorization: memorization,
    NoisyMQAR: recall_solvers.noisy_mqar,
}

TASKS = {
    "forgetting": ForgettingMQAR(vocab_size=256, length=64, pairs=8),
    "compositional": CompositionalMQAR(vocab_size=240, length=66, pairs=9),
    "asked first": AskedFirstMQAR(vocab_size=256, length=48, pairs=8, asked=0.5),
    "asked after": AskedFirstMQAR(vocab_size=256, length=48, pairs=8, passes=2, before=False, filler="zero"),
    "noisy keys": NoisyMQAR(vocab_size=512, length=64, pairs=6),
    "joint": JointRecall(vocab_size=101, contexts=3, keys=5, queries=7),
    "recall": InContextRecall(vocab_size=33, length=39, labels="recalled"),
    "noisy recall": InContextRecall(vocab_size=32, length=39, noise_tokens=16, noise=0.8, labels="recalled"),
    "fuzzy recall": FuzzyRecall(length=60, labels="recalled"),
    "memorization": Memorization(vocab_size=60),
    "compression": Compression(vocab_size=20, length=24),
}

MORE = {
    "forgetting, all": ForgettingMQAR(vocab_size=40, length=42, pairs=4, passes=2, updated=1.0, extrapolation=()),
    "compositional, two passes": CompositionalMQAR(
        vocab_size=64, length=42, pairs=4, passes=2, filler="zero", extrapolation=(2,)
    ),
    "noisy keys, smallest": NoisyMQAR(vocab_size=24, length=12, pairs=2, key_tokens=2, extrapolation=()),
    "noisy keys, without noise": NoisyMQAR(vocab_size=99, length=32, pairs=4, key_tokens=1, replaced=0),
    "joint, full": JointRecall(vocab_size=14, contexts=2, keys=4, queries=8, extrapolation=()),
    "recall, smallest": InContextRecall(vocab_size=4, length=3, labels="recalled"),
    "fuzzy recall, long keys": FuzzyRecall(mixture=(FuzzySlice(length=90, shortest=3),), labels="recalled"),
    "fuzzy recall, smallest": FuzzyRecall(vocab_size=7, length=11, labels="recalled"),
}


UNIFORM = {
    "forgetting": (128, 256),
    "compositional": (160, 240),
    "asked first": (128, 256),
    "noisy keys": (256, 512),
    "joint": (66, 101),
    "recall": (16, 33),
    "noisy recall": (8, 16),
    "fuzzy recall": (7, 15),
}
"""First label, and the one after the last, of tasks whose answers are equally likely."""


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_label_is_what_a_solver_finds(task):
    labels_are_a_solvers(task, SOLVERS[type(task)])
    settings_are_kept_and_possible(task)


@pytest.mark.more
@pytest.mark.parametrize("task", MORE.values(), ids=MORE)
def test_every_label_of_further_settings_is_what_a_solver_finds(task):
    labels_are_a_solvers(task, SOLVERS[type(task)])


@pytest.mark.more
@pytest.mark.parametrize("name", [name for name in TASKS if name != "memorization"])
def test_streams_repeat_and_share_no_example(name):
    streams_repeat_and_share_no_example(TASKS[name])


@pytest.mark.more
@pytest.mark.parametrize("name", UNIFORM)
def test_answers_are_equally_likely(name):
    answers_are_equally_likely(TASKS[name], *UNIFORM[name])


def test_mad_trains_on_every_token_and_scores_recalled_ones():
    recalled = TASKS["recall"]
    task = InContextRecall(vocab_size=33, length=39)
    tokens, labels = drawn(task)
    np.testing.assert_array_equal(tokens, drawn(recalled)[0])
    np.testing.assert_array_equal(labels[:, :-1], tokens[:, 1:])
    batch = jax.device_get(jax.jit(lambda: task.train_batch(5, 0, None, 48))())
    right = (batch.targets % 2 == 0).astype(np.float32)
    scores = task.scores(task.train_slices(), batch, right, right)
    scored = drawn(recalled)[1] >= 0
    assert int(scores["accuracy"][1]) == scored.sum() < labels.size
    assert int(scores["accuracy"][0]) == (scored & (labels % 2 == 0)).sum()


def test_mad_has_the_published_settings_and_a_mean_of_means():
    counts = {name: len(list(mad_settings(name))) for name in MAD}
    assert counts == {
        "in_context_recall": 11,
        "fuzzy_recall": 11,
        "noisy_recall": 14,
        "selective_copying": 13,
        "compression": 11,
        "memorization": 6,
    }
    for name in MAD:
        (_, baseline), *changed = mad_settings(name)
        assert all(task != baseline for _, task in changed) and baseline.evaluation_examples == 1280
    fuzzy = mad("fuzzy_recall")
    assert [part.shortest for part in (*fuzzy.train_slices(), *fuzzy.evaluation_slices())] == [1, 3]
    compression = mad("compression", vocab_size=32)
    tokens = drawn(compression)[0]
    assert compression.length == 32 and set(tokens[:, :-1].flat) == set(range(31)) and set(tokens[:, -1]) == {31}
    accuracies = {name: [0.5] * count for name, count in counts.items()} | {"memorization": [1.0] * 5 + [0.4]}
    assert mad_score(accuracies) == pytest.approx((5 * 0.5 + 0.9) / 6)
    with pytest.raises(UserError, match="memorization: MAD's score needs 6 accuracies of it, 1 given"):
        mad_score(accuracies | {"memorization": [1.0]})
    with pytest.raises(UserError, match="name=recall: MAD has in_context_recall"):
        mad("recall")


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (ForgettingMQAR, {"pairs": 16}, "length=64: pairs=16 need 80 tokens, passes=1"),
        (ForgettingMQAR, {"vocab_size": 11}, "vocab_size=11: pairs=4 need at least 12 ids"),
        (CompositionalMQAR, {"pairs": 5}, "pairs=5: must be a square number, 4 or 9"),
        (AskedFirstMQAR, {"asked": 1.5}, "asked=1.5: must be above 0 and at most 1"),
        (NoisyMQAR, {"replaced": 3}, "replaced=3: must be below key_tokens=3"),
        (NoisyMQAR, {"vocab_size": 27}, "vocab_size=27: pairs=4 need at least 28 ids"),
        (JointRecall, {"queries": 17}, "queries=17: 4 contexts of 4 keys have 16"),
        (JointRecall, {"vocab_size": 95}, "vocab_size=95: the contexts and keys need at least 96"),
        (InContextRecall, {"length": 64}, "length=64: must be odd and at least 3"),
        (InContextRecall, {"noise": 0.2}, "noise=0.2: needs tokens to draw noise from, set noise_tokens"),
        (InContextRecall, {"noise_tokens": 16}, "vocab_size=16: with noise_tokens=16 take 20"),
        (FuzzyRecall, {"length": 10}, "length=10: a pair and its repetition need up to 11 tokens"),
        (FuzzyRecall, {"vocab_size": 6}, "vocab_size=6: keys and values of different tokens need 7"),
        (Memorization, {"length": 31}, "length=31: must be even, a question follows each key; take 32"),
    ],
)
def test_impossible_settings_are_refused_with_what_fits(task, fields, message):
    with pytest.raises(UserError, match=message):
        task(**fields)
