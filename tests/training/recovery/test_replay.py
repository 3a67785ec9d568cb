"""A failed step is kept, run again, and its first broken layer named: poison at a known place must be found there."""

import json

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect import main
from recollect.configuration import UserError
from recollect.layers import Attention, LinearAttention
from recollect.layers.modules.mlp import SwiGLU
from recollect.models import LanguageModel, Stage
from recollect.training.recovery.first_nonfinite import diagnose
from recollect.training.recovery.replay import replay, save_failure
from recollect.training.step import program_for
from tests.training.tiny import tiny


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Five layers in two stages, so that a layer's index, stage, repeat and place in the pattern all differ."""
    experiment = tiny(tmp_path_factory.mktemp("run"), batch_size=4)
    stages = (
        Stage(pattern=(Attention(heads=2), LinearAttention(feature_dim=4)), repeats=2),
        Stage(pattern=(Attention(heads=2),)),
    )
    return program_for(chz.replace(experiment, model=LanguageModel(width=16, stages=stages, mlp=SwiGLU(hidden=16))))


@pytest.fixture
def params(program):
    return jax.tree.map(np.array, program.init(0)["params"])


@pytest.fixture
def batch(program):
    data = program.experiment.data
    return jax.tree.map(np.array, data.train_batch(0, 7, data.train_slices()[0], 4))


def kept(folder, program, params, batch):
    save_failure(folder, program.experiment, params, batch, 7)
    lines: list[str] = []
    return replay(folder, lines.append), lines


def test_a_run_stands_for_its_last_failed_step(program, params, batch, tmp_path):
    save_failure(tmp_path / "failures" / "10", program.experiment, params, batch, 9)
    (tmp_path / "failures" / "9").mkdir()
    (tmp_path / "failures" / "9" / "failure.json").touch()
    lines: list[str] = []
    assert not replay(tmp_path, lines.append) and lines[0].startswith("step 9 of ")


def test_a_healthy_step_is_not_reproduced(program, params, batch, tmp_path):
    reproduced, lines = kept(tmp_path / "failure", program, params, batch)
    assert not reproduced and "every number is finite" in lines[-1]
    parts = [line.split("  ")[1] for line in lines[1:-1]]
    kinds = ["Attention", "LinearAttention", "Attention", "LinearAttention", "Attention"]
    expected = [f"layer {index} {kind} {part}" for index, kind in enumerate(kinds) for part in ("mixer", "mlp")]
    assert parts == ["embedding", *expected, "final norm"]
    # The numbers are those of the model as it trains, scanned: its last hidden vectors.
    hidden = program.model.bind(jax.tree.map(jnp.asarray, params)).hidden(jnp.asarray(batch.tokens)).hidden
    assert float(lines[-2].split()[-1]) == pytest.approx(float(np.abs(hidden).max()), rel=1e-3)
    assert main.main(["replay", str(tmp_path / "failure")]) == 1


@pytest.mark.parametrize(("repeat", "layer"), [(0, 1), (1, 3)])
def test_a_poisoned_parameter_is_named_with_its_layer(program, params, batch, tmp_path, repeat, layer, capsys):
    params["stack"]["stages"]["0"]["1"]["mlp"]["down"]["kernel"][repeat, 0, 0] = np.nan
    reproduced, lines = kept(tmp_path / "failure", program, params, batch)
    assert reproduced
    assert f"the parameter layer {layer} LinearAttention mlp.down.kernel" in lines[-1]
    assert f"first broken activations: layer {layer} LinearAttention mlp" in lines[-1]
    healthy = lines[: next(index for index, line in enumerate(lines) if "not finite" in line)]
    assert f"layer {layer} LinearAttention mixer" in healthy[-1]
    assert (
        json.loads((tmp_path / "failure" / "failure.json").read_text())["found"]["activation"]
        == f"layer {layer} LinearAttention mlp"
    )
    assert main.main(["replay", str(tmp_path / "failure")]) == 0
    assert lines[-1] in capsys.readouterr().out


def test_activations_that_overflow_name_the_layer_without_a_bad_parameter(program, params, batch, tmp_path):
    params["stack"]["stages"]["0"]["0"]["mlp"]["down"]["kernel"][1] *= 1e38
    params["stack"]["stages"]["0"]["0"]["mlp"]["gate"]["kernel"][1] *= 1e20
    found = diagnose(program.experiment, params, batch, 7)
    assert (found.parameter, found.activation, found.batch) == (
        None,
        "layer 2 Attention mlp",
        None,
    ) and not found.finite


def test_a_poisoned_embedding_breaks_only_batches_that_read_it(program, params, batch):
    unused = np.setdiff1d(np.arange(32), np.concatenate([batch.tokens.ravel(), batch.targets.ravel()]))
    used = int(batch.tokens[0, 0])
    params["embedding"][used] = np.inf
    found = diagnose(program.experiment, params, batch, 7)
    assert (found.parameter, found.activation) == ("embedding", "embedding") and found.broken["embedding"] % 16 == 0
    assert found.broken["embedding"] == 16 * int((batch.tokens == used).sum())
    assert len(unused) < 32


def test_a_poisoned_batch_is_told_from_a_poisoned_model(program, params, batch):
    batch.weights[0, 0] = np.nan
    found = diagnose(program.experiment, params, batch, 7)
    assert (found.batch, found.parameter, found.activation) == ("weights", None, None)
    # Every gradient is broken: the way back begins at the head, which is the embedding, and first leaves it at the last
    # norm.
    assert found.gradient == "final_norm.gain" and not np.isfinite(found.loss)
    batch.weights[0, 0], batch.tokens[0, 0] = 1, 99
    assert diagnose(program.experiment, params, batch, 7).batch == "tokens"


def test_a_batch_in_pieces_gives_the_same(program, params, batch):
    split = program_for(chz.replace(program.experiment, run=chz.replace(program.experiment.run, accumulate=2)))
    whole, found = (diagnose(each.experiment, params, batch, 7) for each in (program, split))
    assert (
        found.finite
        and found.loss == pytest.approx(whole.loss, rel=1e-5)
        and found.largest == pytest.approx(whole.largest, rel=1e-4)
    )


def test_folders_that_are_none_are_told(program, params, batch, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        replay(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no failure"):
        replay(tmp_path)
    save_failure(tmp_path / "failure", program.experiment, params, batch, 7)
    (tmp_path / "failure" / "params.npz").write_bytes((tmp_path / "failure" / "params.npz").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot read .*params\.npz"):
        replay(tmp_path / "failure")
