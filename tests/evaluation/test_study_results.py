"""A study of mixers and tasks: intervals over seeds, sensitivity to the learning rate, results.json, the table."""

import json

import numpy as np
import pytest

from recollect.evaluation.intervals import mean_interval, ratio_interval, share_interval
from recollect.evaluation.matrix import format_matrix
from recollect.evaluation.results import load_runs
from recollect.evaluation.study_results import summarise_study, write_study_results
from recollect.evaluation.summaries import summarise
from tests.evaluation.folders import write_run

SCORES = {
    ("recall", "gla"): {1e-3: (0.2, 0.3, 0.4), 3e-3: (0.6, 0.7, 0.8), 1e-2: (0.6, 0.5, 0.4)},
    ("recall", "window"): {1e-3: (0.1, 0.1, 0.1), 3e-3: (0.2, 0.2, 0.5), 1e-2: (0.4, 0.4, 0.4)},
    ("parity", "gla"): {3e-3: (0.5,)},
    ("parity", "window"): {3e-3: (0.75,)},
}


@pytest.fixture
def runs(tmp_path):
    folders = [
        write_run(
            tmp_path / task / name / f"{rate},{seed}",
            name,
            rate,
            seed,
            task=task,
            accuracy=score,
            data={"class": "MQAR" if task == "recall" else "StateTracking"},
        )
        for (task, name), rates in SCORES.items()
        for rate, scores in rates.items()
        for seed, score in enumerate(scores)
    ]
    return load_runs(folders)


def test_the_interval_of_few_values_is_exact_and_of_many_near_the_normal_one():
    assert mean_interval([0.1, 0.9]) is None and mean_interval([0.1, 0.2, float("nan")]) is None
    assert mean_interval([0.3, 0.1, 0.2]) == pytest.approx((0.1, 0.3))  # 1/27 of the resamples is above 2.5 %
    low, high = mean_interval([0.0, 0.0, 0.0, 1.0])  # a mean of 3/4 or more comes in 13 of 256 resamples, of 1 in one
    assert (low, high) == (0.0, 0.75)
    values = np.random.default_rng(1).normal(size=60)
    low, high = mean_interval(list(values))
    half = 1.96 * values.std() / np.sqrt(60)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert mean_interval(list(values)) == (low, high)


def test_the_interval_of_a_ratio_holds_the_true_one_as_often_as_it_says():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 200, (2000, 20)).astype(float)
    totals = sizes * (1.5 + 0.3 * random.normal(size=sizes.shape))  # documents differ; tokens of one do not
    held = [low < 1.5 < high for low, high in map(ratio_interval, totals, sizes)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)
    values = totals[0] / sizes[0]
    half = 2.093 * values.std(ddof=1) / np.sqrt(20)  # of 19 degrees of freedom
    assert ratio_interval(values, np.ones(20)) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-4)
    assert ratio_interval(values[:2], np.ones(2)) is None


def test_the_interval_of_a_share_is_wilsons():
    assert share_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert share_interval(1.0, 1000) == pytest.approx((0.99617, 1.0), abs=1e-5)


def test_sensitivity_is_the_fall_at_the_neighbouring_rates(runs):
    of = {(summary.task, summary.label): summary for summary in summarise(runs)}
    assert of["recall", "gla"].sensitivity == pytest.approx({"lower": 0.4, "higher": 0.2})
    assert of["recall", "window"].sensitivity == pytest.approx({"lower": 0.1})  # best at the highest rate
    assert of["parity", "gla"].sensitivity == {} and of["parity", "gla"].interval is None
    assert of["recall", "gla"].interval == pytest.approx((0.6, 0.8))


def test_results_json_has_every_cell_by_name(runs, tmp_path):
    write_study_results(tmp_path / "results.json", runs)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == summarise_study(runs, tmp_path)
    assert results["tasks"].keys() == {"recall", "parity"} and results["mixers"].keys() == {"gla", "window"}
    assert results["tasks"]["parity"]["data"] == {"class": "StateTracking"}
    cells = {(cell["task"], cell["mixer"]): cell for cell in results["cells"]}
    assert cells.keys() == SCORES.keys()
    cell = cells["recall", "gla"]
    assert (cell["score"], cell["learning_rate"], cell["state_size"]) == (pytest.approx(0.7), 3e-3, 13000)
    assert [rate["seeds"] for rate in cell["rates"]] == [
        {str(seed): score for seed, score in enumerate(scores)} for scores in SCORES["recall", "gla"].values()
    ]
    assert all((tmp_path / run / "config.json").exists() for rate in cell["rates"] for run in rate["runs"].values())
    only = summarise_study([run for run in runs if run.config["task"] == "parity"], tmp_path)
    assert only["tasks"].keys() == {"parity"}  # a single task keeps its name


def test_the_table_has_a_line_per_mixer_and_a_column_per_task(runs):
    lines = format_matrix(summarise(runs)).splitlines()
    assert lines[0].split() == ["mixer", "parity", "recall", "mean"]
    assert lines[3].split() == ["gla", "50.0", "70.0", "±10.0", "60.0"]
    assert lines[4].split() == ["window", "75.0", "40.0", "±0.0", "↑", "57.5"]
    assert lines[5].split() == ["a", "guess", "0.781", "0.781"]
    part = format_matrix(summarise([run for run in runs if "gla" in run.name or run.config["task"] == "recall"]))
    assert [line.split()[-1] for line in part.splitlines()[3:5]] == ["60.0", "-"]  # no mean of a part of the tasks
    narrow = format_matrix(summarise(runs), width=30)
    assert max(map(len, narrow.split("\n\n")[0].splitlines())) <= 30 and narrow.count("mixer ") == 2
