"""A recall task is evaluated on the same examples whatever the batch size."""

import json
from types import SimpleNamespace

import chz
import jax.numpy as jnp
import pytest

from recollect.data.synthetics import RecallSlice
from recollect.main import main
from recollect.training.evaluator import evaluate_members
from recollect.training.step import Program
from tests.training.tiny import tiny

TINY = (
    *("data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=150", "model.width=16"),
    *("run.steps=2", "run.batch_size=8", "run.steps_per_call=2", "run.compile_cache=off"),
)


def test_evaluate_does_not_depend_on_the_batch_size(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "mqar.attention", *TINY, f"run.directory={folder}"]) == 0
    trained = json.loads((folder / "result.json").read_text())
    found = {}
    for size in (5, 128):
        capsys.readouterr()
        assert main(["evaluate", str(folder), f"run.batch_size={size}"]) == 0
        found[size] = json.loads(capsys.readouterr().out)
    for size, metrics in found.items():
        assert metrics["accuracy"] == trained["accuracy"], size
        assert metrics["loss"] == pytest.approx(trained["loss"], rel=1e-5), size


@pytest.mark.parametrize(("examples", "batch_size"), [(50, 7), (64, 64), (150, 7), (150, 64), (150, 130)])
def test_the_examples_are_those_of_batches_of_64(tmp_path, monkeypatch, examples, batch_size):
    """By a sum over tokens and targets that tells examples apart, and counts each once; slices of one length share a
    program, in which the one with fewer pairs has targets that do not count."""
    parts = (RecallSlice(length=16, pairs=1), RecallSlice(length=16, pairs=2), RecallSlice(length=8, pairs=1))
    experiment = tiny(tmp_path, batch_size=batch_size)
    data = chz.replace(experiment.data, evaluation=parts, evaluation_examples=examples)
    program = Program(chz.replace(experiment, data=data))
    traced = []

    def marks(batch):
        return jnp.sum(batch.tokens * jnp.arange(1, batch.tokens.shape[1] + 1), axis=1) + 1000 * batch.targets[:, 0]

    def losses_of(params, batch, weights):
        assert batch.tokens.shape[0] <= batch_size
        traced.append(batch.tokens.shape)
        loss = jnp.zeros_like(weights).at[:, 0].set(marks(batch))
        return SimpleNamespace(loss=loss, correct=jnp.ones_like(weights)), None

    monkeypatch.setattr(program, "losses_of", losses_of)
    found = evaluate_members(program, {}, 3)[0]
    assert len(set(traced)) == 2 and found["exact"] == found["accuracy"] == 1.0
    assert list(found["loss_by_slice"]) == ["16x1", "16x2", "8x1"]
    for part in parts:
        expected, chunk = 0.0, min(64, examples)
        for index in range(-(-examples // chunk)):
            batch = data.evaluation_batch(3, index, part, chunk)
            expected += float(jnp.sum(marks(batch)[: min(chunk, examples - index * chunk)]))
        assert found["loss_by_slice"][part.name] == pytest.approx(expected / examples / part.pairs, rel=1e-6)
