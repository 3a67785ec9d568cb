"""A recall task is evaluated on the same examples whatever the batch size."""

import json

import jax
import jax.numpy as jnp
import pytest

from recollect.data.synthetics import MQAR
from recollect.main import main
from recollect.training.evaluation_examples import sum_over_examples

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


@pytest.mark.parametrize(("examples", "batch_size"), [(50, 7), (64, 64), (150, 7), (150, 130)])
def test_the_examples_are_those_of_batches_of_64(examples, batch_size):
    """By a sum over tokens and targets that tells examples apart, and counts each once."""
    task = MQAR(vocab_size=32, length=16, pairs=2)

    def sums(batch, weights):
        assert batch.tokens.shape[0] <= batch_size
        marks = jnp.sum(batch.tokens * jnp.arange(1, 17), axis=1) + 1000 * batch.targets[:, 0]
        of_rows = jnp.sum(marks * weights[:, 0])
        return {"loss": of_rows, "correct": jnp.sum(weights > 0), "weight": jnp.sum(weights)}

    def draw(index, size):
        return task.evaluation_batch(3, index, None, size)

    found = jax.jit(lambda: sum_over_examples(draw, sums, examples, batch_size))()
    assert found["weight"] == 2 * examples == found["correct"]
    expected = 0.0
    chunk = min(64, examples)
    for index in range(-(-examples // chunk)):
        batch = draw(index, chunk)
        rows = min(chunk, examples - index * chunk)
        marks = jnp.sum(batch.tokens * jnp.arange(1, 17), axis=1) + 1000 * batch.targets[:, 0]
        expected += float(jnp.sum(marks[:rows]))
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-6)
