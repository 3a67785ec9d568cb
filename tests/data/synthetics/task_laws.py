"""Laws of tasks whose labels a solver finds: every label is what the task's definition says, all slices are possible,
training and evaluation share no example, and answers follow their distribution."""

import functools

import numpy as np

from recollect.configuration import from_json, to_json
from recollect.data.synthetics import arrays


@functools.cache
def drawn(task, role="train", rows=48):
    return arrays(task, 0, rows, seed=5, role=role)


def labels_are_a_solvers(task, solver, unknown=()):
    """`unknown`: places whose label may be any token where the solver has none."""
    tokens, labels = drawn(task)
    assert tokens.min() >= 0 and max(tokens.max(), labels.max()) < task.vocabulary
    assert tokens.shape == (48, task.train_slices()[0].length)
    for row, answer in zip(tokens, labels, strict=True):
        actual = {int(place): int(answer[place]) for place in np.flatnonzero(answer >= 0)}
        assert actual == {place: actual[place] for place in unknown} | solver(task, row.tolist())


def settings_are_kept_and_possible(task):
    assert from_json(to_json(task)) == task
    for part in task.evaluation_slices():  # 2, 4 and 8 times as hard, too
        assert 0 <= task.chance(part) <= 0.5
    assert len(task.evaluation_slices()) == 1 + len(task.extrapolation)


def streams_repeat_and_share_no_example(task, few=False):
    """`few`: there are so few examples that two streams meet."""
    train, evaluation = (drawn(task, role, rows=10_000)[0] for role in ("train", "evaluation"))
    assert (arrays(task, 0, 10_000, seed=5)[0] == train).all()
    assert few or not {row.tobytes() for row in train} & {row.tobytes() for row in evaluation}
    assert (train != evaluation).any(axis=1).mean() > 0.99


def answers_are_equally_likely(task, low, high):
    """Answers from `low` to `high` - 1."""
    labels = drawn(task, "train", 10_000)[1]
    last = np.array([row[row >= 0][-1] for row in labels])  # one of each example: independent
    counts = np.bincount(last - low, minlength=high - low)
    assert len(counts) == high - low
    fits(counts, len(last) / (high - low))


def fits(counts, expected):
    """Fails where Pearson's chi-square of counts is not within 5 standard deviations of its mean."""
    degrees = len(counts) - 1
    assert abs(((counts - expected) ** 2 / expected).sum() - degrees) < 5 * np.sqrt(2 * degrees)
