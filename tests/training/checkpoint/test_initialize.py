"""A run that begins with the parameters of another run or of an export: `run.initialize`, through the command line."""

import json
import re
import shutil

import numpy as np
import pytest

from recollect.configuration.io import flatten
from recollect.main import main
from recollect.training.checkpoint.load import load_params

TINY = (
    *("model.width=16", "data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=16"),
    *("run.batch_size=8", "run.steps=2", "run.steps_per_call=2", "run.compile_cache=off"),
)


def train(*arguments):
    return main(["train", "mqar.attention", *TINY, *arguments])


def params_of(run, step=None):
    return flatten(load_params(run / "checkpoints", step=step)[0])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of four steps with checkpoints at 2 and 4, and its export."""
    folder = tmp_path_factory.mktemp("source")
    assert train("run.steps=4", "run.checkpoint_every=2", f"run.directory={folder / 'run'}") == 0
    assert main(["export", str(folder / "run"), str(folder / "export")]) == 0
    return folder


@pytest.mark.parametrize("name, step", [("run", 4), ("run:2", 2), ("export", 4)])
def test_begins_with_the_parameters_and_says_so(source, tmp_path, capsys, monkeypatch, name, step):
    run = tmp_path / "new"
    # A learning rate that moves nothing: what the run ends with is what it began with.
    start = f"run.initialize={source / name}"
    assert train(start, "optimizer.learning_rate=1e-30", "optimizer.ema=0.9", f"run.directory={run}") == 0
    assert f"begins with the parameters of {source / name}, step {step}" in capsys.readouterr().out
    expected = params_of(source / "run", step)
    for name_of, leaf in params_of(run).items():
        np.testing.assert_array_equal(leaf, expected[name_of])
    assert {n: v.tolist() for n, v in flatten(load_params(run / "checkpoints", ema=True)[0]).items()} == {
        n: v.tolist() for n, v in expected.items()
    }
    origin = json.loads((run / "result.json").read_text())["initialized_from"]
    assert origin == json.loads((run / "initialized_from.json").read_text())
    assert origin["step"] == step and origin["path"] == str(source / name.split(":")[0]) and len(origin["sha256"]) == 64


def test_resumes_without_the_source(source, tmp_path, capsys):
    shutil.copytree(source / "run", tmp_path / "copy")
    settings = (
        f"run.initialize={tmp_path / 'copy'}",
        f"run.directory={tmp_path / 'new'}",
        "optimizer.schedule=constant",
    )
    assert train(*settings) == 0
    shutil.rmtree(tmp_path / "copy")
    assert train(*settings, "run.steps=4") == 0
    out = capsys.readouterr().out
    assert "resumed at step 2" in out and out.count("begins with") == 1
    assert json.loads((tmp_path / "new" / "result.json").read_text())["initialized_from"]["step"] == 4


def test_a_larger_vocabulary_keeps_the_rows_that_both_have(source, tmp_path, capsys):
    settings = (f"run.initialize={source / 'run'}", f"run.directory={tmp_path / 'new'}", "data.vocab_size=40")
    assert train(*settings) == 2 and not (tmp_path / "new").exists()
    error = capsys.readouterr().err
    assert "another vocabulary: embedding (32, 16) there, (40, 16) here; run.initialize_mismatch=vocabulary" in error
    assert train(*settings, "run.initialize_mismatch=vocabulary", "optimizer.learning_rate=1e-30") == 0
    old, new = params_of(source / "run"), params_of(tmp_path / "new")
    np.testing.assert_array_equal(new["embedding"][:32], old["embedding"])
    assert new["embedding"].shape == (40, 16) and np.std(new["embedding"][32:]) > 0.01


def test_missing_extra_and_reshaped_parameters_are_refused_unless_asked_for(source, tmp_path, capsys):
    settings = (f"run.initialize={source / 'run'}", f"run.directory={tmp_path / 'new'}", "model.tied=False")
    assert train(*settings) == 2
    assert "head.kernel is not there; run.initialize_mismatch=any" in capsys.readouterr().err
    assert train(*settings, "run.initialize_mismatch=any") == 0
    assert "drawn afresh: head.kernel" in capsys.readouterr().out
    assert train(f"run.initialize={source / 'run'}", f"run.directory={tmp_path / 'wide'}", "model.width=32") == 2
    error = capsys.readouterr().err
    assert "embedding is (32, 16) there, (32, 32) here" in error and "more; run.initialize_mismatch=any" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "nowhere is not there; give a run or an export"),
        ("run:3", "has no checkpoint of step 3; there are 2, 4"),
        ("export:4", "is an export, which has one step; leave :4 out"),
        ("run/checkpoints", "is neither a run's folder (checkpoints/) nor an export (manifest.json)"),
    ],
)
def test_a_source_that_is_none_is_one_error_line(source, tmp_path, capsys, name, message):
    assert train(f"run.initialize={source / name}", f"run.directory={tmp_path / 'new'}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


def test_low_rank_updates_are_trained_alone_and_exported_as_plain_weights(source, tmp_path, capsys):
    lora = ("model.lora=LoRA", "model.lora.rank=2", f"run.initialize={source / 'run'}")
    assert train(*lora, f"run.directory={tmp_path / 'lora'}") == 0
    before, after = params_of(source / "run"), params_of(tmp_path / "lora")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert any(np.any(after[name]) for name in after.keys() - before.keys() if name.endswith(".b"))
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "plain")]) == 0
    assert main(["describe", "mqar.attention", *TINY, *lora]) == 0
    assert re.search(r"\n  trainable +320\n", capsys.readouterr().out)
    # The export has the names of the plain model, and begins another run.
    assert train(f"run.initialize={tmp_path / 'plain'}", f"run.directory={tmp_path / 'next'}") == 0


def test_members_of_a_population_begin_with_their_own(source, tmp_path):
    from recollect.configuration import apply_overrides
    from recollect.experiments.registry import load
    from recollect.training.sweeps.population import train_population

    base = apply_overrides(load("mqar.attention", "experiment"), [*TINY, "optimizer.learning_rate=1e-30"])
    members = [
        apply_overrides(base, [f"run.directory={tmp_path / str(step)}", f"run.initialize={source / 'run'}:{step}"])
        for step in (2, 4)
    ]
    train_population(members, lambda line: None)
    for step in (2, 4):
        np.testing.assert_array_equal(
            params_of(tmp_path / str(step))["embedding"], params_of(source / "run", step)["embedding"]
        )
