import json
import math

import pytest

from recollect.configuration import UserError
from recollect.evaluation.results import load_run, load_runs
from recollect.evaluation.summaries import slice_order
from tests.evaluation.folders import write_run


def test_load_run_reads_what_training_wrote(tmp_path):
    run = load_run(write_run(tmp_path / "a", accuracy=0.75, seed=3))
    assert (run.name, run.scores["accuracy"], run.seed, run.status) == ("mqar.based", 0.75, 3, "finished")
    assert run.state_bytes == {64: 12468, 128: 13000, 1024: 99999}
    assert run.overrides["run.seed"] == 3 and run.config["model"]["width"] == 64
    assert run.metric == "accuracy" and run.by_slice["64x4"] == 0.75
    assert run.slices["128x8"] == {"length": 128, "pairs": 8}  # of a result that does not say, by the name


def test_a_result_says_what_it_is_ranked_by_and_the_sizes_of_its_slices(tmp_path):
    sizes = {"16x2": {"length": 16, "copied": 2}, "8x1": {"length": 8, "copied": 1}}
    scores = {
        "exact": 0.5,
        "exact_by_slice": {"16x2": 0.25, "8x1": 0.75},
        "accuracy_by_slice": {"16x2": 0.5, "8x1": 1.0},
    }
    run = load_run(write_run(tmp_path / "a", accuracy=0.75, metric="exact", slices=sizes, **scores))
    assert (run.metric, run.score, run.scores["accuracy"]) == ("exact", 0.5, 0.75)
    assert run.slices == sizes and run.by_slice["16x2"] == 0.25 and slice_order([run]) == ["8x1", "16x2"]
    with pytest.raises(UserError, match="'slices' must be an object"):
        load_run(write_run(tmp_path / "b", slices=[1]))


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
        ({"accuracy": None}, "none of 'accuracy', 'exact', 'bits_per_byte', 'bits_per_token'"),
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


def test_a_run_that_diverged_may_have_no_score(tmp_path):
    folder = write_run(tmp_path / "a", accuracy=None, curve=[], status="diverged")
    result = json.loads((folder / "result.json").read_text()) | {"bits_per_byte": None}
    (folder / "result.json").write_text(json.dumps(result))
    assert load_run(folder).metric == "bits_per_byte" and math.isnan(load_run(folder).score)


def test_load_runs_reads_a_folder_once(tmp_path):
    folder = write_run(tmp_path / "a")
    assert len(load_runs([folder, tmp_path / "x" / ".." / "a"])) == 1
