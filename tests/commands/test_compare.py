"""`compare RUN...`: tables and plots of runs that exist, from any folder."""

import csv

import pytest

from recollect.main import main
from tests.evaluation.folders import write_run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder outside the checkout with runs of two tasks and of text, and one that is not finished."""
    for rate, accuracy in ((1e-3, 0.2), (1e-2, 0.8)):
        write_run(
            tmp_path / f"runs/short/{rate},seed=0", rate=rate, accuracy=accuracy, data={"class": "MQAR", "length": 64}
        )
    write_run(tmp_path / "runs/long", "mqar.window", accuracy=0.5, data={"class": "MQAR", "length": 128})
    text = {"accuracy": None, "bits_per_byte": 2.5, "bits_by_slice": {"rest": 2.5}, "chance": None}
    write_run(tmp_path / "runs/text", "text.based", curve=[(100, 2.5)], data={"class": "Text", "length": 64}, **text)
    (write_run(tmp_path / "runs/short/unfinished") / "result.json").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_runs_of_several_tasks_have_a_table_and_plots_each(runs, capsys):
    assert main(["compare", "runs"]) == 0
    out = capsys.readouterr().out
    assert "runs: 1 of 5 runs are not finished and are left out" in out
    assert "3 tables: scores of different tasks or metrics do not compare" in out
    for task in ("MQAR [length=64]", "MQAR [length=128]", "Text"):
        assert f"\n{task}\n" in out
    assert "mqar.based" in out and "0.01 ↑" in out
    folders = {path.parent.name for path in (runs / "compared").rglob("learning_curves.png")}
    assert len(folders) == 3 and not (runs / "compared/Text/recall_vs_state.png").exists()
    with (runs / "compared/results.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_globs_and_single_runs(runs, capsys):
    assert main(["compare", "runs/short/0*", "runs/short/0.001,seed=0", "--out", "here"]) == 0
    out = capsys.readouterr().out
    assert "tables:" not in out and (runs.parent / "here/recall_vs_state.png").exists()
    assert "lr 0.001  lr 0.01" in out


def test_the_same_run_twice_in_two_folders_is_said(runs, capsys):
    write_run(runs / "again", rate=1e-2, accuracy=0.8, data={"class": "MQAR", "length": 64})
    assert main(["compare", "runs/short", "runs/again"]) == 0
    assert "1 of 3 runs repeat another's config and seed" in capsys.readouterr().out


def test_what_is_no_finished_run_is_left_out_beside_others(runs, capsys):
    (runs / "report.html").write_text("")
    (runs / "nothing").mkdir()
    every = sorted(map(str, (runs / "short").iterdir())) + [str(runs / "report.html"), str(runs / "nothing")]
    assert main(["compare", *every, "--out", "here"]) == 0
    out = capsys.readouterr().out
    assert "unfinished: is not finished and is left out" in out and out.count("holds no run and is left out") == 2
    assert "2×1" in out


def test_figures_of_an_earlier_comparison_do_not_stay(runs, capsys):
    assert main(["compare", "runs"]) == 0
    (runs / "compared/mine.txt").write_text("stays")
    assert main(["compare", "runs/long"]) == 0
    assert not (runs / "compared/accuracy_by_learning_rate.png").exists() and (runs / "compared/mine.txt").exists()
    assert not [path for path in (runs / "compared").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs/nothing"], "runs/nothing names no folder: give run folders"),
        (["runs/long", "run.steps=3"], "run.steps=3 names no folder"),
        (["."], None),
        (["runs/short", "--only", "x"], "--only: is for a study, which is trained; runs/short names runs that exist"),
        (["runs/short", "--sweep", "run.seed=0,1"], "--sweep: is for a study"),
        (["runs/short", "--with", "missing.py"], "--with: is for a study"),
        (["runs/short", "--no-together"], "--together: is for a study"),
        (["runs/short/unfinished"], "is not finished: it holds no result.json"),
    ],
)
def test_what_is_no_run_is_named(runs, capsys, arguments, said):
    code = main(["compare", *arguments])
    err = capsys.readouterr().err
    assert (code, err) == (0, "") if said is None else (code == 2 and err.count("\n") == 1 and said in err)
