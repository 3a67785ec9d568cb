"""`--sweep` on train and compare, overrides of swept fields, `--only` beside `--with`, folders of variants: outside the
checkout."""

import csv
import json

import pytest

from recollect.configuration import UserError, python_files
from recollect.experiments.mqar import attention, small
from recollect.experiments.sweep_axes import split, swept
from recollect.main import main
from recollect.training.sweeps import study as study_module
from recollect.training.sweeps.member_folders import member_name
from recollect.training.sweeps.study import StudyProgress, minutes, run_study
from tests.training.tiny import tiny

TINY = [
    *("data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=32", "model.width=8"),
    *("run.steps=2", "run.batch_size=8", "run.steps_per_call=1"),
]
RATES = "optimizer.learning_rate"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_module, "WORTH_PROCESSES", float("inf"))  # on a busy machine too


def points(*sweeps, overrides=(), of=None):
    return swept((of or small()).sweep, sweeps, overrides, attention())


def test_axes_are_added_replaced_and_set():
    assert points() == small().sweep and len(points()) == 4
    assert points(f"{RATES}=1e-3,3e-3,1e-2") == tuple(
        {"run.seed": seed, RATES: rate} for seed in (0, 1) for rate in (1e-3, 3e-3, 1e-2)
    )
    assert points(overrides=[f"{RATES}=1e-4"]) == ({"run.seed": 0}, {"run.seed": 1})
    assert points(overrides=["...learning_rate=1e-4", "run.seed=7"]) == ({},)
    assert len(points(f"{RATES}=1e-3", "run.seed=0,1,2", "model.width=32,64")) == 6
    mixers = points("model.stages.0.pattern.1=Attention,SlidingWindow(window=8, heads=2)", overrides=["run.seed=0"])
    assert [member_name(point) for point in mixers[:2]] == [
        "learning_rate=0.003,pattern.1=Attention",
        "learning_rate=0.003,pattern.1=SlidingWindow_window=8,_heads=2_",
    ]


def test_a_study_of_no_experiments_is_refused(capsys, tmp_path):
    (tmp_path / "none.py").write_text("from recollect.experiments.study import Study\n\nempty = Study(())\n")
    assert main(["compare", "none.py"]) == 2
    assert capsys.readouterr().err == "error: none has no experiments: there is nothing to train\n"
    python_files.forget()


def test_commas_within_brackets_do_not_split():
    assert split("(A, B(x=1, y=2)),C,[1,2]") == ["(A, B(x=1, y=2))", "C", "[1,2]"]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ([RATES], "the form is path=v1,v2"),
        ([f"{RATES}="], "the form is path=v1,v2"),
        ([f"{RATES}=1e-3,,1e-2"], "a value is missing between two commas"),
        ([f"{RATES}=1e-3,0.001"], "0.001 is there twice"),
        ([f"{RATES}=1e-3,fast"], "optimizer.learning_rate=fast"),
        (["lr=1e-3,1e-2"], "did you mean optimizer.learning_rate=1e-3?"),
        ([f"{RATES}=1", "...learning_rate=2"], "is swept twice"),
        (["run.directory=a,b"], "--out DIR"),
        (["name=a,b"], "names a run"),
    ],
)
def test_mistakes_in_a_sweep(sweep, said):
    with pytest.raises(UserError) as caught:
        points(*sweep)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_train_with_axes_is_a_study_in_a_folder_that_names_them(tmp_path, capsys):
    command = ["train", "mqar.attention", *TINY, "--sweep", f"{RATES}=1e-3,1e-2", "--sweep", "run.seed=0,1"]
    assert main(command) == 0
    folder = tmp_path / "runs/mqar.attention,learning_rate,seed"
    out = capsys.readouterr().out
    assert "run 1 of 4: mqar.attention learning_rate=0.001,seed=0" in out and "2×2" in out
    with (folder / "results.csv").open(newline="") as file:
        rows = [(float(row["learning_rate"]), int(row["seed"])) for row in csv.DictReader(file)]
    assert rows == [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)]
    assert main([*command[:-1], "run.seed=0,1,2"]) == 0  # a longer axis trains what is new
    out = capsys.readouterr().out
    assert out.count("already finished") == 4 and "2×3" in out


def test_compare_trains_what_was_asked_and_nothing_else(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from recollect.layers import SlidingWindow\n\nmine = SlidingWindow(window=4)\n")
    command = [
        "compare",
        "mqar.small",
        *TINY,
        "--only",
        "mqar.attention",
        "--with",
        "mine.py",
        f"{RATES}=1e-4",
        "run.seed=5",
    ]
    assert main(command) == 0
    configs = [json.loads(path.read_text()) for path in (tmp_path / "runs/mqar.small").rglob("config.json")]
    assert {config["name"] for config in configs} == {"mqar.attention", "mine"}  # the one of --with stays
    assert {(config["optimizer"]["learning_rate"], config["run"]["seed"]) for config in configs} == {(1e-4, 5)}
    assert "lr 0.0001" not in capsys.readouterr().out  # one rate is no axis


def test_a_part_of_a_study_keeps_the_others_rows_and_trains_nothing_twice(tmp_path, capsys):
    def rows():
        with (tmp_path / "runs/mqar.small/results.csv").open(newline="") as file:
            return {(row["name"], row["learning_rate"], row["seed"]): row["folder"] for row in csv.DictReader(file)}

    part = ["compare", "mqar.small", *TINY, "--only", "mqar.attention"]
    assert main([*part, "run.seed=0"]) == 0  # its folders are named by the rate alone
    before = rows()
    capsys.readouterr()
    assert main([*part, "--sweep", "run.seed=0", "--sweep", f"{RATES}=0.003"]) == 0
    out = capsys.readouterr().out
    assert out.count("already finished") == 1
    assert "1 run that runs/mqar.small holds beside these is shown too" in out
    assert rows() == before and len(before) == 2
    assert len(list((tmp_path / "runs/mqar.small/mqar.attention").iterdir())) == 2


def test_a_second_variant_has_a_folder_that_says_what_differs(tmp_path, capsys):
    assert main(["train", "mqar.attention", *TINY]) == 0
    capsys.readouterr()
    other = ["train", "mqar.attention", *TINY, "model.width=16", "optimizer=Lion(learning_rate=1e-4)"]
    assert main(other) == 0
    assert "runs/mqar.attention holds another variant of mqar.attention; this one is in" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").glob("mqar.attention,*")
    assert "width=16" in folder.name and "optimizer=Lion" in folder.name and len(folder.name) <= 120
    assert main(other) == 0
    assert f"{folder.relative_to(tmp_path)}: already finished" in capsys.readouterr().out
    assert main(["train", "mqar.attention", *TINY]) == 0
    assert "runs/mqar.attention: already finished" in capsys.readouterr().out
    assert main(["train", "mqar.attention", *TINY, "optimizer.frozen=nothing"]) == 2
    assert "another variant" not in capsys.readouterr().out  # nothing is said of what is refused


def test_progress_counts_runs_and_estimates_the_rest(tmp_path):
    said: list[str] = []
    progress = StudyProgress(28, said.append)
    progress.begin([tiny(tmp_path / "a")])
    progress.end(1, 0.1)  # finished before: no measure of time
    progress.begin([tiny(tmp_path / "b")])
    progress.end(1, 30.0)
    progress.begin([tiny(tmp_path / "c")])
    assert said == ["run 1 of 28: tiny a", "run 2 of 28: tiny b", "run 3 of 28, about 13 minutes left: tiny c"]
    assert [minutes(seconds) for seconds in (0, 1, 80, 100, 3600, 9000)] == [
        *("1 second", "1 second", "80 seconds", "2 minutes", "60 minutes", "2 hours")
    ]


def test_runs_that_would_share_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="two runs of the study would share this folder"):
        run_study([tiny(tmp_path), tiny(tmp_path)], ({},), tmp_path, log=lambda text: None)
