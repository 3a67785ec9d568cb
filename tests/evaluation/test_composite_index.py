"""CAB's composite index: its published values from its published scores, and an index within a set of models."""

import pytest

from recollect.evaluation.composite_index import PUBLISHED, composite_index, references

VANILLA = {
    "noncausal self": (3.4748, 1.9735, 4.0953, 2.1985, 34.61, 6.35, 31.66, 23.18, 0.675, 3.42),
    "noncausal cross": (7.425, 0.231, 0.779, 1.138167, 0.77467, 0.478, 0.508, 0.449, 0.4855),
}
"""Scores of softmax attention by metric, in the order of PUBLISHED (CAB's scripts/compositional_index/example.txt)."""


@pytest.mark.parametrize(("pattern", "published"), [("noncausal self", -0.0247), ("noncausal cross", 0.5968)])
def test_published_scores_give_the_published_index(pattern, published):
    scores = iter(VANILLA[pattern])
    of_vanilla = {task: dict(zip(metrics, scores, strict=False)) for task, metrics in PUBLISHED[pattern].items()}
    assert next(scores, None) is None
    assert composite_index(of_vanilla, PUBLISHED[pattern]) == pytest.approx(published, abs=5e-5)


def test_an_index_within_a_set_has_mean_0_and_less_loss_is_better():
    models = [{"recall": {"accuracy": a, "loss": b}} for a, b in ((0.9, 0.2), (0.5, 1.0), (0.1, 3.0))]
    within = references(models)
    first, second, third = (composite_index(model, within) for model in models)
    assert first > second > third and first + second + third == pytest.approx(0, abs=1e-12)
    assert first == pytest.approx(((0.9 - 0.5) / 0.3266 + (1.4 - 0.2) / 1.1776) / 2, abs=1e-3)
    same = [{"recall": {"accuracy": 1.0}}] * 2
    assert composite_index(same[0], references(same)) == 0
