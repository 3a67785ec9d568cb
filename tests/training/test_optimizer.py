"""Muon against its definition, matrix by matrix; schedules; the running average; and a run with both that resumes."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recollect.configuration import UserError, apply_overrides, from_json, to_json
from recollect.layers import Attention, Hyena
from recollect.layers.modules.mlp import SwiGLU
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.models.functional import flatten
from recollect.training.checkpoint.load import load_params
from recollect.training.checkpoint.schedule_change import rate_change
from recollect.training.experiment import program_of
from recollect.training.muon import Muon
from recollect.training.optimizer import AdamW, Optimizer
from recollect.training.train import train
from tests.training.tiny import tiny


@pytest.fixture(scope="module")
def model():
    stages = repeat(Attention(heads=2), Hyena(maximum_length=16, filter_order=8), depth=4)
    return FunctionalModel(LanguageModel(width=16, stages=stages, mlp=SwiGLU(hidden=24), tied=False), 32)


def updates_of(optimizer, model, grads, steps=1):
    """The updates of the last of `steps` steps on the same gradients, from parameters of zero."""
    transform = optimizer.transform(model, 100, optimizer.values())

    @jax.jit
    def run(grads):
        params = jax.tree.map(jnp.zeros_like, grads)
        state = transform.init(params)
        for _ in range(steps):
            updates, state = transform.update(grads, state, params)
        return updates

    return flatten(run(grads))


def normal_like(model):
    leaves, tree = jax.tree.flatten(model.abstract_params())
    chance = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [chance.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def newton_schulz(matrix):
    """Jordan et al.'s five steps, in float64."""
    wide = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if wide else matrix) / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if wide else x


def test_muon_orthogonalises_each_layers_matrix_by_itself(model):
    grads = normal_like(model)
    optimizer = Muon(learning_rate=1.0, schedule="constant", weight_decay=0.0)
    updates = updates_of(optimizer, model, grads)
    labels = flatten(optimizer.labels(model))
    matrices = {name for name, label in labels.items() if label == "matrix"}
    assert "stack.stages.0.0.mixer.query.kernel" in matrices and "stack.stages.0.1.mlp.down.kernel" in matrices
    assert (
        not {name for name in matrices if "filter" in name or not name.endswith(".kernel")}
        and "head.kernel" not in matrices
    )
    for name, grad in flatten(grads).items():
        if name not in matrices:
            np.testing.assert_allclose(updates[name], -np.sign(grad), rtol=1e-4, err_msg=name)  # Adam's first step
            continue
        for layer, matrix in enumerate(grad.astype(np.float64)):
            expected = -0.2 * max(matrix.shape) ** 0.5 * newton_schulz(matrix)
            np.testing.assert_allclose(updates[name][layer], expected, rtol=1e-3, atol=1e-4, err_msg=name)
            values = np.linalg.svd(updates[name][layer], compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            assert values.max() < 1.3 and np.median(values) > 0.6


def test_muons_decay_groups_and_learning_rate_reach_matrices(model):
    grads = normal_like(model)
    plain = Muon(learning_rate=1.0, schedule="constant", weight_decay=0.0)
    half = chz.replace(plain, learning_rate=0.5)
    one, two = updates_of(plain, model, grads, steps=2), updates_of(half, model, grads, steps=2)
    for name in one:
        np.testing.assert_allclose(two[name], 0.5 * one[name], rtol=1e-4, atol=1e-6)


def test_schedules_fall_where_they_say():
    def rates(**settings):
        optimizer = AdamW(learning_rate=2.0, **settings)
        return [float(optimizer.rate(step, 100, 2.0)) for step in range(101)]

    stable = rates(schedule="wsd", decay_share=0.25, warmup=10, final_fraction=0.1)
    assert stable[0] == pytest.approx(0.2) and set(stable[10:76]) == {2.0} and stable[100] == pytest.approx(0.2)
    assert stable[88] == pytest.approx(2 * (1 - 0.9 * 13 / 25), rel=1e-5)
    line = rates(schedule="linear", warmup=20)
    assert line[20] == 2.0 and line[60] == pytest.approx(1.0) and line[100] == 0.0
    assert rates(schedule="constant")[100] == 2.0 and rates()[50] == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_run_may_be_the_first_steps_of_a_longer_schedule(schedule):
    long = AdamW(schedule=schedule, warmup=3, final_fraction=0.1)
    cut = chz.replace(long, decay_steps=100)
    assert all(cut.rate(step, 60, 2.0) == long.rate(step, 100, 2.0) for step in range(60))
    assert cut.rate(130, 160, 2.0) == pytest.approx(0.2)  # past the schedule the last rate stays
    assert rate_change(cut, 60, before=60, now=90) is None
    with pytest.raises(UserError, match=r"warmup=101: must be at most optimizer\.decay_steps=100"):
        chz.replace(cut, warmup=101)
    with pytest.raises(UserError, match="decay_steps=2147483648: must be at least 1 and at most 2147483647"):
        chz.replace(cut, decay_steps=2**31)


def test_the_running_average_starts_short_and_then_reaches_far():
    optimizer = AdamW(ema=0.9)
    average, seen = {"x": jnp.zeros(3)}, []
    for step in range(200):
        average = optimizer.averaged(average, {"x": jnp.full(3, float(step))}, step)
        seen.append(float(average["x"][0]))
    assert seen[1] == pytest.approx(1 - 2 / 11), "the decay at step 1 is 2 / 11"
    assert seen[-1] == pytest.approx(199 - 9, abs=0.01), "a ramp is followed 0.9 / 0.1 steps behind"


def test_old_configs_swaps_and_mistakes(tmp_path, model):
    experiment = tiny(tmp_path)
    old = to_json(experiment)
    for name in ("ema", "decay_share"):
        del old["optimizer"][name]
    for name in ("stop_after_nonfinite", "spikes"):
        del old["run"][name]
    del old["loss"]
    assert from_json(old) == experiment
    swapped = apply_overrides(experiment, ["optimizer=Muon", "optimizer.momentum=0.9"])
    assert swapped.optimizer == Muon(momentum=0.9, learning_rate=1e-2, decay_everything=True)
    assert from_json(to_json(swapped)) == swapped
    assert program_of(swapped) == program_of(
        apply_overrides(swapped, ["optimizer.momentum=0.5", "optimizer.learning_rate=1.0"])
    )
    assert program_of(swapped) != program_of(experiment)
    for bad, message in (("ema=1.5", "ema=1.5"), ("decay_share=0.0", "decay_share=0.0"), ("schedule=wds", "schedule")):
        with pytest.raises(UserError, match=message):
            apply_overrides(experiment, [f"optimizer.{bad}"])
    with pytest.raises(UserError, match=r"momentum=1\.0"):
        Muon(momentum=1.0)
    with pytest.raises(TypeError, match="abstract class Optimizer"):
        Optimizer()


def test_a_run_with_muon_and_an_average_resumes_and_is_evaluated_by_the_average(tmp_path):
    def experiment(folder, steps):
        made = tiny(tmp_path / folder, steps=steps, batch_size=4, checkpoint_every=10, evaluate_every=20)
        return chz.replace(made, optimizer=Muon(learning_rate=1e-2, schedule="constant", ema=0.8))

    whole = train(experiment("whole", 20), log=lambda text: None)
    train(experiment("parts", 10), log=lambda text: None)
    lines: list[str] = []
    parts = train(experiment("parts", 20), log=lines.append)
    assert any("resumed at step 10" in line for line in lines) and parts["loss"] == whole["loss"]
    average, _, _ = load_params(tmp_path / "parts" / "checkpoints", ema=True)
    params, _, _ = load_params(tmp_path / "parts" / "checkpoints")
    distance = optax.global_norm(jax.tree.map(jnp.subtract, average, params)) / optax.global_norm(params)
    assert 1e-4 < float(distance) < 0.5
