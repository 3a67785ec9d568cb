"""MAD's table: which model a task has, and the means of means."""

import pytest

from recollect.data.synthetics import Compression
from recollect.data.synthetics.mad import MAD
from recollect.experiments import mad
from recollect.models import Autoencoder


def test_compression_alone_has_the_bottleneck_and_small_sets_train_fewer_steps():
    study = mad.table()
    assert (len(study.experiments), len(study.sweep)) == (8 * 66, 6)
    for experiment in (*study.experiments, *mad.small().experiments):
        assert isinstance(experiment.model, Autoencoder) == isinstance(experiment.data, Compression)
    steps = {one.task: one.run.steps for one in study.experiments}
    assert (steps["noisy_recall noise=0.8"], steps["fuzzy_recall train_examples=800"]) == (20_000, 1400)
    assert steps["memorization"] == 400


def test_a_score_is_the_mean_of_means_and_needs_every_setting():
    tasks = {one.task for one in mad.table().experiments}
    bests = {("whole", task): float(task.startswith("compression")) for task in tasks}
    bests |= {("part", task): 0.5 for task in tasks if task != "memorization"}
    rows = mad.scores(bests)
    assert rows["whole"] == pytest.approx({name: float(name == "compression") for name in MAD} | {"score": 1 / 6})
    assert rows["part"] == dict.fromkeys(MAD, 0.5) | {"memorization": None, "score": None}
