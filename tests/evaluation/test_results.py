import json
import math

import pytest

from recollect.configuration import UserError
from recollect.evaluation.results import (
    group_by_label,
    load_run,
    load_runs,
    slice_order,
    summarise,
)
from tests.evaluation.folders import write_run


def test_load_run_reads_what_training_wrote(tmp_path):
    run = load_run(write_run(tmp_path / "a", accuracy=0.75, seed=3))
    assert (run.name, run.accuracy, run.seed, run.status) == ("mqar.based", 0.75, 3, "finished")
    assert run.state_bytes == {64: 12468, 128: 13000, 1024: 99999}
    assert run.overrides["run.seed"] == 3 and run.config["model"]["width"] == 64
    assert run.metric == "accuracy" and run.by_slice["64x4"] == 0.75


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


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no run folder .*nowhere"):
        load_run(tmp_path / "nowhere")
    folder = write_run(tmp_path / "a")
    (folder / "result.json").unlink()
    with pytest.raises(UserError, match=f"{folder} is not finished"):
        load_run(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config.json"):
        load_run(folder)


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_broken_json_names_file_and_line(tmp_path, name):
    folder = write_run(tmp_path / "a")
    (folder / name).write_text('{"name": "x",\n "steps": ,}')
    with pytest.raises(UserError, match=rf"{name}, line 2"):
        load_run(folder)
    (folder / name).write_bytes(b'{"\xff": 1}')
    with pytest.raises(UserError, match=name):
        load_run(folder)
    (folder / name).write_text("[1]")
    with pytest.raises(UserError, match=rf"{name} must hold one JSON object"):
        load_run(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": "high"}, "'accuracy' must be a number, not 'high'"),
        ({"steps": None}, "'steps' must be a number, not None"),
        ({"seed": True}, "'seed' must be a number"),
        ({"status": 3}, "'status' must be text"),
        ({"state_bytes": {"long": 3}}, "not sequence lengths: 'long'"),
        ({"accuracy_by_slice": {"64x4": "x"}}, "'accuracy_by_slice' must be an object of numbers"),
        ({"overrides": [1]}, "'overrides' must be an object"),
        ({"accuracy": None}, "neither 'accuracy' nor 'bits_per_byte'"),
    ],
)
def test_wrong_fields_are_named(tmp_path, changes, message):
    changes = {"curve": [], "accuracy_by_slice": {}, **changes}
    accuracy = changes.pop("accuracy", 0.5)
    folder = write_run(tmp_path / "a", **changes)
    result = json.loads((folder / "result.json").read_text()) | {"accuracy": accuracy}
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=message):
        load_run(folder)


def test_load_runs_reads_a_folder_once(tmp_path):
    folder = write_run(tmp_path / "a")
    assert len(load_runs([folder, tmp_path / "x" / ".." / "a"])) == 1


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
    assert "mqar.based [model.stages.0.window=16, model.stages.1.window=8]" in groups


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


def test_slices_are_ordered_by_numbers_not_text():
    assert slice_order(["1024x256", "64x16", "128x8", "64x4", "64x4"]) == ["64x4", "64x16", "128x8", "1024x256"]
    assert slice_order(["rest", "64x4", "all"]) == ["rest", "64x4", "all"]
