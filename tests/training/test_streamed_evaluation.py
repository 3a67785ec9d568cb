"""`evaluate --streamed`: through decoding states the metrics are those of whole sequences, and caches are measured."""

import chz
import jax
import numpy as np
import pytest

from recollect.configuration import UserError, apply_overrides
from recollect.data.synthetics import MQAR, GridQuestions
from recollect.data.text import Text
from recollect.layers import Attention, BaseConvolution, BlockSelection
from recollect.layers.modules import MeanBlocks
from recollect.models import LanguageModel, repeat
from recollect.training.checkpoint.load import evaluate_run
from recollect.training.evaluator import evaluate
from recollect.training.experiment import Experiment, Run
from recollect.training.step import program_for
from recollect.training.streamed_evaluation import evaluate_streamed

EXPERIMENT = Experiment(
    name="streamed",
    model=LanguageModel(width=16, stages=repeat(BaseConvolution(kernel=3), Attention(heads=2), depth=2)),
    data=MQAR(vocab_size=32, length=16, pairs=2, evaluation_examples=24),
    run=chz.replace(Run(), batch_size=16),
)
PREFILL = 6


@pytest.fixture(scope="module")
def params():
    return program_for(EXPERIMENT).model.init(jax.random.key(0))


def test_metrics_are_those_of_whole_sequences(params):
    whole = evaluate(program_for(EXPERIMENT), params, 0)
    streamed = evaluate_streamed(EXPERIMENT, params, PREFILL)
    np.testing.assert_allclose(streamed["loss"], whole["loss"], rtol=1e-5)
    assert streamed["accuracy"] == whole["accuracy"] and streamed["metric"] == whole["metric"]
    assert streamed["keys_read"] == np.mean(range(PREFILL + 1, 17))  # each token reads itself and all before it
    assert "mass_kept" not in streamed
    # A convolution's two last inputs, and keys and values of 16 tokens with position, segment; cursors and count.
    inputs, tokens = 2 * 16 * 4, 16 * (2 * 16 + 2) * 4
    assert streamed["state_bytes"] == {"16": inputs + tokens + 2 * 8 + 4}


def test_a_policy_of_the_command_line_changes_what_is_held_and_read(params):
    smaller = apply_overrides(EXPERIMENT, ["model...cache=RecentTokens(budget=4)"])
    streamed = evaluate_streamed(smaller, params, PREFILL)
    assert streamed["keys_read"] == 4 and streamed["keys_read_by_slice"] == {"16x2": 4}
    assert streamed["state_bytes"]["16"] < 4 * (2 * 16 + 2) * 4 + 2 * 16 * 4 + 64
    assert streamed["loss"] != evaluate_streamed(EXPERIMENT, params, PREFILL)["loss"]


def test_selectors_report_what_they_read_and_the_mass_of_it():
    """A token reads its own block, the best one before it, and the means of all before it."""
    moba = BlockSelection(heads=2, retrieve=MeanBlocks(block=4, top=2))
    experiment = chz.replace(EXPERIMENT, model=LanguageModel(width=16, stages=repeat(moba, depth=2)))
    streamed = evaluate_streamed(experiment, program_for(experiment).model.init(jax.random.key(0)), PREFILL)
    per_layer = [i % 4 + 1 + (4 if i >= 4 else 0) + i // 4 for i in range(PREFILL, 16)]
    np.testing.assert_allclose(streamed["keys_read"], 2 * np.mean(per_layer), rtol=1e-6)
    # With weights near their start a token attends to all alike, so that the mass is about the share of keys.
    shares = [min(1, (i % 4 + 5) / (i + 1)) for i in range(PREFILL, 16)]
    np.testing.assert_allclose(streamed["mass_kept"], np.mean(shares), rtol=0.02)


def test_text_is_streamed_too(tmp_path):
    (tmp_path / "corpus.txt").write_text("a text of some words, and of more words. " * 50)
    experiment = chz.replace(
        EXPERIMENT, data=Text(source=str(tmp_path), length=16, held_out_bytes=256), run=chz.replace(Run(), batch_size=4)
    )
    program = program_for(experiment)
    params = program.model.init(jax.random.key(0))
    streamed, whole = evaluate_streamed(experiment, params, PREFILL), evaluate(program, params, 0, final=True)
    np.testing.assert_allclose(streamed["bits_per_byte"], whole["bits_per_byte"], rtol=1e-5)
    assert 0 < streamed["keys_read"] <= 16


def test_what_cannot_be_streamed_is_refused(params, tmp_path):
    with pytest.raises(UserError, match="--prefill 16: must leave a token"):
        evaluate_streamed(EXPERIMENT, params, 16)
    grid = chz.replace(EXPERIMENT, data=GridQuestions(side=2, objects=2, questions=2, evaluation_examples=16))
    with pytest.raises(UserError, match="--streamed gives plain tokens"):
        evaluate_streamed(grid, program_for(grid).model.init(jax.random.key(0)), 2)
    with pytest.raises(UserError, match="add --streamed"):
        evaluate_run(tmp_path, ["model...cache=Full"])
