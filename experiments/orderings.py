"""Orderings of mixers that a study is expected to show, and whether its runs do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from recollect.evaluation.metrics import METRICS
from recollect.evaluation.summaries import Summary


@dataclasses.dataclass(frozen=True)
class Ordering:
    """States that one mixer is better than another on a task.

    Attributes:
      task, better, worse: names in the study.
      by: least difference, in units of the task's metric.
      why: in a few words, with its source.
    """

    task: str
    better: str
    worse: str
    by: float
    why: str


def checked(orderings: Sequence[Ordering], summaries: Sequence[Summary]) -> Iterator[tuple[Ordering, bool, str]]:
    """Yields each ordering of which both mixers were trained, whether it holds, and that as a line of text."""
    cells = {(summary.task, summary.label): summary for summary in summaries}
    for expected in orderings:
        pair = [cells.get((expected.task, mixer)) for mixer in (expected.better, expected.worse)]
        if pair[0] is None or pair[1] is None:
            continue
        better, worse, metric = pair[0].best, pair[1].best, METRICS[pair[0].metric]
        holds = (better - worse if metric.percent else worse - better) >= expected.by
        said = f"{expected.task}: {expected.better} above {expected.worse} by {metric.text(expected.by)}"
        scores = f"{metric.text(better)} against {metric.text(worse)}"
        yield expected, holds, f"{'holds' if holds else 'DOES NOT HOLD'}: {said} ({expected.why}): {scores}"
