"""Summaries of runs: scores over settings and seeds, by learning rate and by task, and the edges of what was tried."""

import json
import math

import pytest

from recollect.evaluation.results import load_run, load_runs
from recollect.evaluation.summaries import by_learning_rate, group_by_label, group_by_task, slice_order, summarise
from tests.evaluation.folders import write_run


def test_text_runs_are_scored_by_bits_and_lower_is_better(tmp_path):
    text = {"accuracy_by_slice": None, "loss_by_slice": None, "chance": None, "overrides": None}
    folders = [
        write_run(
            tmp_path / f"{rate}",
            "text.based",
            rate,
            curve=[],
            accuracy=None,
            bits_per_byte=bits,
            bits_by_slice={"rest": bits, "recall": None},
            **text,
        )
        for rate, bits in ((1e-3, 1.25), (3e-3, 1.5))
    ]
    (summary,) = summarise(load_runs(folders))
    assert (summary.metric, summary.best, summary.learning_rate, summary.by_slice) == (
        "bits_per_byte",
        1.25,
        1e-3,
        {"rest": 1.25},
    )


def test_summary_averages_seeds_before_it_picks_the_rate(tmp_path):
    # The single best run (0.9) is at 1e-3, whose mean over seeds is worse.
    scores = {(1e-3, 0): 0.9, (1e-3, 1): 0.1, (2e-3, 0): 0.6, (2e-3, 1): 0.8, (1e-2, 0): 0.2, (1e-2, 1): 0.3}
    folders = [
        write_run(tmp_path / f"{rate}-{seed}", rate=rate, seed=seed, accuracy=score)
        for (rate, seed), score in scores.items()
    ]
    (summary,) = summarise(load_runs(folders))
    assert (summary.label, summary.learning_rate, summary.seeds, summary.settings, summary.runs) == (
        "mqar.based",
        2e-3,
        2,
        3,
        6,
    )
    assert summary.best == pytest.approx(0.7)
    assert summary.median == pytest.approx(0.5)
    assert summary.spread == pytest.approx(0.2 / math.sqrt(2))
    assert summary.seconds == pytest.approx(63.0)
    assert list(summary.by_slice) == ["64x4", "64x16", "128x8"]
    assert summary.by_slice["128x8"] == pytest.approx(0.35)
    assert summary.spread_by_slice["128x8"] == pytest.approx(0.1 / math.sqrt(2))


def test_state_is_taken_at_the_longest_evaluated_length(tmp_path):
    (summary,) = summarise([load_run(write_run(tmp_path / "a"))])
    assert (summary.state_length, summary.state_size) == (128, 13000)
    (summary,) = summarise([load_run(write_run(tmp_path / "b", accuracy_by_slice={"all": 1.0}))])
    assert summary.state_length == 1024
    (summary,) = summarise([load_run(write_run(tmp_path / "c", state_bytes={}))])
    assert summary.state_size is None


def test_one_seed_has_no_spread(tmp_path):
    (summary,) = summarise([load_run(write_run(tmp_path / "a"))])
    assert math.isnan(summary.spread) and all(math.isnan(value) for value in summary.spread_by_slice.values())


def test_other_optimizer_fields_are_settings_not_seeds(tmp_path):
    folders = [
        write_run(tmp_path / f"{decay}", accuracy=score, optimizer={"learning_rate": 1e-3, "weight_decay": decay})
        for decay, score in ((0.0, 0.25), (0.1, 0.75))
    ]
    (summary,) = summarise(load_runs(folders))
    assert (summary.best, summary.median, summary.seeds, summary.settings) == (0.75, 0.5, 1, 2)


def test_runs_with_another_model_are_another_architecture(tmp_path):
    folders = [write_run(tmp_path / f"{width}", model={"width": width, "depth": 2}) for width in (64, 128)]
    folders.append(write_run(tmp_path / "other", "mqar.window"))
    assert list(group_by_label(load_runs(folders))) == [
        "mqar.based [width=64]",
        "mqar.based [width=128]",
        "mqar.window",
    ]


def test_labels_stay_apart_when_field_names_repeat(tmp_path):
    models = [{"stages": [{"window": a}, {"window": b}]} for a, b in ((8, 8), (16, 8), (8, 16))]
    groups = group_by_label(load_runs([write_run(tmp_path / f"{i}", model=model) for i, model in enumerate(models)]))
    assert len(groups) == 3
    assert "mqar.based [stages.0.window=16, stages.1.window=8]" in groups


def test_diverged_runs_count_and_are_shown(tmp_path):
    folders = [
        write_run(tmp_path / "a", accuracy=0.75),
        write_run(tmp_path / "b", seed=1, accuracy=0.25, status="diverged", loss=math.nan),
    ]
    (summary,) = summarise(load_runs(folders))
    assert (summary.best, summary.diverged) == (0.5, 1)


def test_nan_scores_are_the_worst_setting(tmp_path):
    folders = [
        write_run(tmp_path / "a", rate=1e-2, accuracy=math.nan),
        write_run(tmp_path / "b", rate=1e-3, accuracy=0.0),
    ]
    (summary,) = summarise(load_runs(folders))
    assert (summary.best, summary.median, summary.learning_rate) == (0.0, 0.0, 1e-3)


def test_summaries_come_best_first(tmp_path):
    folders = [write_run(tmp_path / name, name, accuracy=score) for name, score in (("a", 0.1), ("b", 0.9), ("c", 0.5))]
    assert [summary.label for summary in summarise(load_runs(folders))] == ["b", "c", "a"]


def test_slices_are_ordered_by_numbers_not_text(tmp_path):
    for metric, names, ordered in (
        ("accuracy", ["1024x256", "64x16", "128x8", "64x4"], ["64x4", "64x16", "128x8", "1024x256"]),
        ("bits", ["rest", "64x4", "all"], ["rest", "64x4", "all"]),
    ):
        changes = {} if metric == "accuracy" else {"accuracy": None, "bits_per_byte": 1.0, "curve": []}
        changes[f"{metric}_by_slice"] = dict.fromkeys(names, 0.5)
        runs = load_runs(write_run(tmp_path / f"{metric}{seed}", seed=seed, **changes) for seed in (0, 1))
        assert slice_order(runs) == ordered


def test_the_best_value_at_an_edge_of_its_axis_is_named(tmp_path):
    def edges(name, scores, **other):
        runs = load_runs(write_run(tmp_path / f"{name}-{r}", name, r, accuracy=a, **other) for r, a in scores.items())
        return summarise(runs)[0].edges

    assert edges("high", {1e-3: 0.1, 3e-3: 0.5, 1e-2: 0.9}) == {"optimizer.learning_rate": "highest"}
    assert edges("low", {1e-3: 0.9, 3e-3: 0.5}) == {"optimizer.learning_rate": "lowest"}
    assert edges("within", {1e-3: 0.1, 3e-3: 0.9, 1e-2: 0.5}) == {}
    assert edges("one", {1e-3: 0.5}) == {}
    assert edges("solved", {1e-3: 0.5, 3e-3: 1.0}) == {}  # no rate can be better
    decays = [
        write_run(tmp_path / f"decay {d}", "decay", accuracy=d, optimizer={"learning_rate": 1e-3, "weight_decay": d})
        for d in (0.0, 0.1)
    ]
    assert summarise(load_runs(decays))[0].edges == {"optimizer.weight_decay": "highest"}


def test_scores_by_learning_rate_are_means_over_seeds(tmp_path):
    scores = {(1e-2, 0): 0.5, (1e-3, 0): 0.2, (1e-3, 1): 0.4}
    runs = load_runs(write_run(tmp_path / f"{r}-{s}", rate=r, seed=s, accuracy=a) for (r, s), a in scores.items())
    points = by_learning_rate(runs)["mqar.based"]
    assert list(points) == [1e-3, 1e-2]
    assert points[1e-3].mean == pytest.approx(0.3) and points[1e-3].spread == pytest.approx(0.2 / math.sqrt(2))
    assert points[1e-3].seeds == 2 and math.isnan(points[1e-2].spread)
    by_rate = summarise(runs)[0].by_rate
    assert {rate: point.mean for rate, point in by_rate.items()} == {rate: point.mean for rate, point in points.items()}


def test_tasks_are_told_apart_by_what_is_evaluated(tmp_path):
    short = {"class": "MQAR", "length": 64, "vocab_size": 32}
    mixed = {**short, "mixture": [{"class": "RecallSlice", "length": 64, "pairs": 2}]}  # other training, same questions
    data = {"a": short, "b": mixed, "c": {**short, "length": 128}}
    tasks = group_by_task(load_runs(write_run(tmp_path / name, name, data=data[name]) for name in data))
    assert {task: [run.name for run in runs] for task, runs in tasks.items()} == {
        "MQAR [length=64]": ["a", "b"],
        "MQAR [length=128]": ["c"],
    }
    assert list(group_by_task(load_runs([tmp_path / "a", tmp_path / "b"]))) == [""]


def test_runs_that_begin_or_train_otherwise_are_other_architectures(tmp_path):
    frozen = {"class": "AdamW", "learning_rate": 1e-4, "frozen": ["embedding", "stack.*"]}
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "frozen", rate=1e-4, optimizer=frozen)]
    config = json.loads((runs[1] / "config.json").read_text())
    config["run"]["initialize"] = "runs/plain"
    (runs[1] / "config.json").write_text(json.dumps(config))
    runs.append(write_run(tmp_path / "lion", optimizer={"class": "Lion", "learning_rate": 1e-3}))
    assert [(summary.label, summary.seeds, summary.settings) for summary in summarise(load_runs(runs))] == [
        ("mqar.based [optimizer=AdamW, frozen=embedding,stack.*, initialize=runs/plain]", 1, 1),
        ("mqar.based [optimizer=AdamW]", 1, 1),
        ("mqar.based [optimizer=Lion]", 1, 1),
    ]


def test_runs_of_one_seed_count_once(tmp_path):
    scores = {"a": (0, 0.25), "b": (0, 0.75), "c": (1, 0.75)}
    folders = [write_run(tmp_path / name, seed=seed, accuracy=score) for name, (seed, score) in scores.items()]
    (summary,) = summarise(load_runs(folders))
    assert (summary.seeds, summary.best, summary.runs) == (2, pytest.approx(0.625), 3)
    assert summary.spread == pytest.approx(0.25 / math.sqrt(2))
    (summary,) = summarise(load_runs(folders[:2]))
    assert summary.seeds == 1 and math.isnan(summary.spread)
