"""The studies of the atlas have the sizes that their docstrings state, and take mixers of a user's."""

import pytest

from recollect.experiments import atlas
from recollect.layers import Attention


@pytest.mark.parametrize(("study", "mixers", "tasks", "points"), [(atlas.tiny, 6, 4, 2), (atlas.small, 12, 8, 9)])
def test_sizes(study, mixers, tasks, points):
    made = study()
    assert {experiment.task for experiment in made.experiments} == set(list(atlas.TASKS)[:tasks])
    assert len({experiment.name for experiment in made.experiments}) == mixers
    assert (len(made.experiments), len(made.sweep)) == (mixers * tasks, points)
    assert [experiment.task for experiment in made.template("mine", Attention())] == list(atlas.TASKS)[:tasks]
