"""The studies of the atlas: their sizes, mixers of a user's, what is printed of finished runs, expected orderings."""

import pytest

from recollect.configuration import UserError
from recollect.evaluation.results import load_runs
from recollect.evaluation.summaries import summarise
from recollect.experiments import atlas, compare
from recollect.experiments.orderings import Ordering, checked
from recollect.layers import Attention
from tests.evaluation.folders import write_run


@pytest.mark.parametrize(
    ("study", "mixers", "tasks", "points"), [(atlas.tiny, 6, 4, 2), (atlas.small, 12, 8, 9), (atlas.attention, 1, 8, 3)]
)
def test_sizes(study, mixers, tasks, points):
    made = study()
    assert {experiment.task for experiment in made.experiments} == set(list(atlas.TASKS)[:tasks])
    assert len({experiment.name for experiment in made.experiments}) == mixers
    assert (len(made.experiments), len(made.sweep)) == (mixers * tasks, points)
    assert [experiment.task for experiment in made.template("mine", Attention())] == list(atlas.TASKS)[:tasks]


def test_expected_orderings_name_what_the_studies_have():
    made = {(experiment.task, experiment.name) for experiment in atlas.tiny().experiments}
    assert {(one.task, mixer) for one in atlas.EXPECTED for mixer in (one.better, one.worse)} <= made


def test_every_task_and_mixer_is_there_at_the_length_of_the_task():
    tasks = atlas.every_task()
    assert {"copying", "z60", "ruler_vt", "mad_compression"} <= tasks.keys() and "mqarvariant" not in tasks
    assert all(atlas.every_mixer(length)["hyena"].maximum_length == length for length in (48, 257))
    assert [atlas.every_mixer(length)["log_linear_mamba2"].levels for length in (64, 65)] == [7, 8]


@pytest.fixture
def folders(tmp_path):
    scores = {("mqar", "a"): 0.9, ("mqar", "b"): 0.5, ("parity", "a"): 0.5, ("parity", "b"): 0.75}
    return [
        write_run(tmp_path / task / name, name, task=task, accuracy=score) for (task, name), score in scores.items()
    ]


def test_finished_runs_are_a_table_and_orderings_are_checked(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "draw_all", lambda *arguments: [])
    monkeypatch.setattr(compare, "write_report", lambda *arguments: None)
    expects = (Ordering("parity", "b", "a", 0.2, "why"), Ordering("mqar", "b", "a", 0.0, "why not"))
    compare.report(folders, tmp_path, expects=expects)
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["mixer", "mqar", "parity", "mean"]
    assert "holds: parity: b above a by 20.0 (why): 75.0 against 50.0" in out
    assert "DOES NOT HOLD: mqar: b above a by 0.0 (why not): 50.0 against 90.0" in out
    assert "lr×seeds" not in out and "lr×seeds" in (tmp_path / "tables.txt").read_text()
    assert list(checked(expects, summarise(load_runs(folders[:1])))) == []  # the other mixer was not trained


def test_only_picks_mixers_and_tasks(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(compare, "run_study", lambda experiments, *others, **options: trained.extend(experiments) or [])
    monkeypatch.setattr(compare, "report", lambda *arguments: None)
    monkeypatch.setattr(compare, "_others", lambda *arguments: [])

    def names(*only):
        trained.clear()
        compare.compare(atlas.tiny(), "atlas.tiny", tmp_path, only=only)
        return [(one.task, one.name) for one in trained]

    assert names("parity", "mqar", "window") == [("mqar", "window"), ("parity", "window")]
    assert len(names("parity")) == 6 and len(names("window")) == 4
    with pytest.raises(UserError, match="no experiment 'party'; did you mean parity"):
        names("party")
