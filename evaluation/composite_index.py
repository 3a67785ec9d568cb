"""CAB's composite index: how far a model is above the average of models, over tasks with different metrics.

    z_metric = (score - mean) / deviation,  negated for metrics of which less is better
    index = mean over tasks of the mean over a task's metrics of z

Mean and deviation are of a fixed set of models per metric: a published set (`PUBLISHED`), or the models of a study
(`references`).

Source: Zhang et al. 2023, CAB (arXiv 2210.07661), section 4; Shark-NLP/CAB, scripts/compositional_index.

Easy to get wrong: an index is relative to its set. One bad model in it (perplexity 111.7 among 3.3 to 25.3 there)
widens the deviation so that all others look alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Scores = Mapping[str, Mapping[str, float]]
"""Scores by task and metric."""


class Reference(NamedTuple):
    """Mean and standard deviation of a metric over a set of models, and whether less of it is better."""

    mean: float
    deviation: float
    lower_is_better: bool = False

    def z(self, score: float) -> float:
        """Returns how many deviations a score is better than the mean; 0 where all models have one score."""
        difference = self.mean - score if self.lower_is_better else score - self.mean
        return difference / self.deviation if self.deviation else 0.0


References = Mapping[str, Mapping[str, Reference]]
"""References by task and metric."""

_LESS = True
PUBLISHED: dict[str, References] = {
    "noncausal self": {
        "speech": {
            "FastSpeech 2 MCD": Reference(3.4245, 0.06832, _LESS),
            "FastSpeech 2 MSD": Reference(1.97429, 0.0361768, _LESS),
            "Transformer-TTS MCD": Reference(4.06947, 0.09422, _LESS),
            "Transformer-TTS MSD": Reference(2.19021, 0.03866, _LESS),
        },
        "summaries": {
            "ROUGE-1": Reference(34.88667, 1.39697),
            "ROUGE-2": Reference(6.79333, 1.41078),
            "ROUGE-L": Reference(31.96889, 1.31499),
        },
        "super-resolution": {"PSNR": Reference(23.208, 0.27499), "SSIM": Reference(0.6758, 0.01557)},
        "masked language model": {"perplexity": Reference(36.292, 62.30827, _LESS)},
    },
    "causal self": {
        "speech": {"MCD": Reference(4.08325, 0.04529, _LESS), "MSD": Reference(2.20085, 0.01372, _LESS)},
        "summaries": {
            "ROUGE-1": Reference(32.9575, 1.92754),
            "ROUGE-2": Reference(6.0925, 0.41007),
            "ROUGE-L": Reference(30.2575, 1.61951),
        },
        "language model": {"perplexity": Reference(22.26, 8.29944, _LESS)},
    },
    "noncausal cross": {
        "point clouds": {
            "CD-l1": Reference(7.7025, 0.64789, _LESS),
            "CD-l2": Reference(0.24775, 0.03366, _LESS),
            "F-score": Reference(0.7625, 0.03906),
        },
        "time series": {
            "ETT MSE": Reference(1.18933, 0.05615, _LESS),
            "ETT MAE": Reference(0.80625, 0.02193, _LESS),
            "ECL MSE": Reference(0.47575, 0.01057, _LESS),
            "ECL MAE": Reference(0.511, 0.00601, _LESS),
            "Weather MSE": Reference(0.62025, 0.18948, _LESS),
            "Weather MAE": Reference(0.58075, 0.10312, _LESS),
        },
    },
    "causal cross": {
        "speech": {"MCD": Reference(5.5037, 1.29239, _LESS), "MSD": Reference(2.6278, 0.42726, _LESS)},
        "summaries": {
            "ROUGE-1": Reference(31.35, 3.77103),
            "ROUGE-2": Reference(5.26, 1.26028),
            "ROUGE-L": Reference(28.8, 3.28638),
        },
    },
}
"""CAB's references by pattern of attention."""


def composite_index(scores: Scores, references: References) -> float:
    """Returns the index of a model that has a score in every metric of the references."""
    tasks = {
        task: statistics.fmean(reference.z(scores[task][metric]) for metric, reference in metrics.items())
        for task, metrics in references.items()
    }
    return statistics.fmean(tasks.values())


def references(models: Sequence[Scores], lower_is_better: frozenset[str] = frozenset({"loss"})) -> References:
    """Returns the references that models give which have scores in the same tasks and metrics; `lower_is_better` names
    metrics. Deviations are those of the models themselves (n in the denominator)."""
    found = {}
    for task, metrics in models[0].items():
        columns = {metric: [model[task][metric] for model in models] for metric in metrics}
        found[task] = {
            metric: Reference(statistics.fmean(column), statistics.pstdev(column), metric in lower_is_better)
            for metric, column in columns.items()
        }
    return found
