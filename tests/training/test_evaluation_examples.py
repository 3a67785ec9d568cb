"""A recall task is evaluated on the same examples whatever the batch size."""

import json

import jax.numpy as jnp
import pytest

from recollect.main import main
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
    """By a sum over tokens and targets that tells examples apart, and counts each once."""
    program = Program(tiny(tmp_path, batch_size=batch_size))
    part = program.data.evaluation_slices()[0]

    def marks(batch):
        return jnp.sum(batch.tokens * jnp.arange(1, 17), axis=1) + 1000 * batch.targets[:, 0]

    def sums(params, batch, weights):
        assert batch.tokens.shape[0] <= batch_size
        of_rows = jnp.sum(marks(batch) * weights[:, 0])
        return {"loss": of_rows, "correct": jnp.sum(weights > 0).astype(jnp.float32), "weight": jnp.sum(weights)}

    monkeypatch.setattr(program, "sums", sums)
    found = program.evaluate({}, 3, examples, part)
    assert found["weight"] == 2 * examples == found["correct"]
    expected, chunk = 0.0, min(64, examples)
    for index in range(-(-examples // chunk)):
        batch = program.data.evaluation_batch(3, index, part, chunk)
        expected += float(jnp.sum(marks(batch)[: min(chunk, examples - index * chunk)]))
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-6)
