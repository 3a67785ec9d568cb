"""Training on streams: batches go on from the state of the batch before, without a gradient into it, also after a
restart."""

import shutil

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError, apply_overrides
from recollect.data.batch import Batch
from recollect.data.text import Text
from recollect.data.text.rows import Streams
from recollect.layers import LinearAttention, RelativeConvolutionalAttention
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW
from recollect.training.step import member_values, program_for
from recollect.training.train import train
from tests.training.same_run import assert_same_run

LENGTH = 8


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "text.txt").write_text("a text of some words, and of more words. " * 20)
    mixers = (RelativeConvolutionalAttention(heads=2, window=6), LinearAttention(feature_dim=4))
    settings = {"steps": 4, "batch_size": 2, "carry_state": True, "steps_per_call": 2, "log_every": 1}
    return Experiment(
        name="streams",
        model=LanguageModel(width=8, stages=repeat(*mixers, depth=2)),
        data=Text(source=str(folder / "corpus"), length=LENGTH, sequences=Streams(), held_out_bytes=64),
        optimizer=AdamW(learning_rate=1e-2, schedule="constant"),
        run=chz.replace(Run(), **settings, checkpoint_every=2, evaluate_every=4, directory=str(folder / "whole")),
    )


@pytest.fixture(scope="module")
def batches(experiment):
    stream = experiment.data.batches(0, 2)
    return [stream.read(number, 0, 2) for number in range(2)]


@pytest.fixture(scope="module")
def step(experiment):
    program, values = program_for(experiment), member_values([experiment], False)
    return jax.jit(lambda state, batch: program.step(state, values, batch))


def test_a_batch_sees_what_the_one_before_left_and_sends_no_gradient_there(experiment, batches, step):
    program, (first, second) = program_for(experiment), batches
    params = program.init(0)["params"]
    state, metrics = step(program.init(0), first)
    _, continued = step({**state, "params": params, "opt_state": program.init(0)["opt_state"]}, second)
    pairs = ([getattr(batch, name) for batch in batches] for name in ("tokens", "targets", "weights"))
    tokens, targets, weights = (jnp.concatenate(pair, axis=1) for pair in pairs)

    def loss(params):
        entropy, _ = program.losses_of(params, Batch(tokens, targets, None, weights), weights)
        parts = (slice(LENGTH), slice(LENGTH, None))
        before, after = (jnp.sum((entropy.loss * weights)[:, part]) / weights[:, part].sum() for part in parts)
        return after, before

    (after, before), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose([metrics["loss"], continued["loss"]], [before, after], rtol=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    assert abs(continued["gradient_norm"] / norm - 1) > 1e-3, "the whole gradient reads both batches"
    _, alone = step(program.init(0), second)
    assert abs(alone["loss"] - after) > 1e-4


def test_a_skipped_step_leaves_the_state(experiment, batches, step):
    state, _ = step(program_for(experiment).init(0), batches[0])
    broken = {**state, "params": jax.tree.map(lambda leaf: leaf * jnp.nan, state["params"])}
    after, metrics = step(broken, batches[1])
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, after["carried"], state["carried"])


def test_a_restart_goes_on_with_the_same_bits(experiment, tmp_path):
    whole = tmp_path / "whole"
    train(apply_overrides(experiment, [f"run.directory={whole}"]), log=lambda text: None)
    shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    (tmp_path / "again" / "result.json").unlink()
    lines: list[str] = []
    train(apply_overrides(experiment, [f"run.directory={tmp_path / 'again'}"]), log=lines.append)
    assert any("resumed at step 2" in line for line in lines)
    assert_same_run(whole, tmp_path / "again", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.sequences=Packed()"], r"needs data.sequences=Streams\(\)"),
        (["model...window=None"], "needs a model without tables of positions"),
        (["model...relative=False", "model...window=None"], "RelativeConvolutionalAttention keeps every token"),
        (["model.stages.0.pattern.0=Attention(heads=2, causal=False)"], "Attention does not"),
        (["run.accumulate=2"], "needs run.accumulate=1"),
        (["run.mesh.data=2"], "runs on one device"),
        (["model.remat=full"], 'needs model.remat="none"'),
        (["model.embedding_dropout=0.1"], "needs a model without dropout"),
    ],
)
def test_what_cannot_go_on_is_refused(experiment, changes, message):
    with pytest.raises(UserError, match=message):
        program_for(apply_overrides(experiment, changes))
