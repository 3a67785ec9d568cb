"""The optimizer against its definition, gradient accumulation, schedules, sharding rules and the loss."""

import itertools

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import Hyena
from recollect.models import FunctionalModel, repeat
from recollect.models.functional import flatten
from recollect.training.loss import Loss
from recollect.training.optimizer import AdamW, GroupRate
from recollect.training.step import Program, member_values
from tests.training.tiny import tiny


def test_adamw_is_its_definition(tmp_path):
    """Three steps by hand in float64 on the program's own gradients; decay on everything, then on tagged parameters
    only."""
    for everything in (True, False):
        experiment = tiny(tmp_path, steps=10)
        experiment = chz.replace(
            experiment, optimizer=AdamW(learning_rate=0.1, weight_decay=0.5, decay_everything=everything)
        )
        program = Program(experiment)
        state = program.init(0)
        values = member_values([experiment], False)
        params = {name: np.asarray(leaf, np.float64) for name, leaf in flatten(state["params"]).items()}
        decays = flatten(program.model.tags("decay"))
        first, second = ({name: np.zeros_like(leaf) for name, leaf in params.items()} for _ in range(2))
        data = experiment.data
        gradient, advance = jax.jit(program.gradients, static_argnums=2), jax.jit(program.step)
        for step in range(3):
            batch = data.train_batch(0, step, data.train_slices()[0], 16)
            grads = flatten(gradient(state["params"], batch, None)[0])
            state, _ = advance(state, values, batch)
            rate = 0.1 * 0.5 * (1 + np.cos(np.pi * step / 10))
            for name, grad in grads.items():
                g = np.asarray(grad, np.float64)
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                decay = 0.5 if everything or decays[name] else 0.0
                params[name] = params[name] - rate * (m / (np.sqrt(v) + 1e-8) + decay * params[name])
        for name, leaf in flatten(state["params"]).items():
            # A gradient that is rounding alone becomes a full Adam step of either sign: compare where it is not.
            clear = np.sqrt(second[name]) > 1e-6
            np.testing.assert_allclose(np.asarray(leaf)[clear], params[name][clear], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulated_gradients_equal_whole_ones(tmp_path, pieces):
    whole, split = Program(tiny(tmp_path)), Program(tiny(tmp_path, accumulate=pieces))
    params = whole.init(0)["params"]
    data = whole.experiment.data
    batch = data.train_batch(0, 0, data.train_slices()[0], 16)
    a, metrics_a = jax.jit(whole.gradients, static_argnums=2)(params, batch, None)
    b, metrics_b = jax.jit(split.gradients, static_argnums=2)(params, batch, None)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-7)
    assert float(metrics_a["loss"]) == pytest.approx(float(metrics_b["loss"]), rel=1e-5)
    assert float(metrics_a["accuracy"]) == pytest.approx(float(metrics_b["accuracy"]), rel=1e-5)


def test_a_chunked_loss_is_the_whole_one(tmp_path):
    """With a z-loss, for one member and for two at once."""
    base = tiny(tmp_path)
    whole, chunked = (Program(chz.replace(base, loss=Loss(z_loss=1e-2, chunk=chunk))) for chunk in (None, 7))
    data = base.data
    batch = data.train_batch(0, 0, data.train_slices()[0], 16)
    members = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(jax.jit(whole.model.init)(jax.random.key(seed)) for seed in (0, 1))
    )

    def found(program):
        return jax.jit(jax.vmap(lambda params: program.gradients(params, batch, None)))(members)

    (gradients, metrics), (expected, expected_metrics) = found(chunked), found(whole)
    for left, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-7)
    assert metrics.keys() == expected_metrics.keys() >= {"loss", "accuracy", "z_loss"}
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-5, err_msg=name)
    # Logits are near 0 at the start, so lse is log(32), and the z-loss 1e-2 of its square.
    np.testing.assert_allclose(metrics["z_loss"], 1e-2 * np.log(32) ** 2, rtol=0.02)
    with pytest.raises(UserError, match="chunk=0"):
        Loss(chunk=0)


def test_loss_and_accuracy_at_labelled_positions_only(tmp_path):
    program = Program(tiny(tmp_path))
    params = program.init(0)["params"]
    data = program.experiment.data
    batch = data.train_batch(0, 0, data.train_slices()[0], 16)
    entropy, _ = program.losses_of(params, batch, batch.weights)
    sums = program.data.scores((), batch, entropy.correct, entropy.loss)
    logits = np.asarray(program.model.bind(params)(batch.tokens), np.float64)
    rows = np.arange(16)[:, None]
    chosen = logits[rows, np.asarray(batch.target_positions)]
    p = np.exp(chosen - chosen.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(p, np.asarray(batch.targets)[..., None], -1))[..., 0]
    right = chosen.argmax(-1) == np.asarray(batch.targets)
    assert float(sums["loss"][0]) == pytest.approx(nll.sum(), rel=1e-5)
    assert [float(number) for number in sums["accuracy"]] == [right.sum(), right.size]
    assert [float(number) for number in sums["exact"]] == [right.all(1).sum(), 16]


def test_a_collapsed_model_is_not_right(tmp_path):
    """All logits equal: no answer counts as correct."""
    program = Program(tiny(tmp_path))
    params = jax.tree.map(jnp.zeros_like, program.init(0)["params"])
    data = program.experiment.data
    batch = data.train_batch(0, 0, data.train_slices()[0], 16)
    assert not np.any(program.losses_of(params, batch, batch.weights)[0].correct)


def test_schedules():
    cosine = AdamW(warmup=10, final_fraction=0.1)
    rates = [float(cosine.rate(step, 110, 1.0)) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[110] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.55) and all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert float(AdamW(schedule="constant").rate(77, 100, 0.5)) == 0.5


def test_clipping_bounds_the_update(tmp_path):
    experiment = tiny(tmp_path)
    program = Program(chz.replace(experiment, optimizer=AdamW(clip=1e-3)))
    model = program.model
    transform = program.experiment.optimizer.transform(model, 10, program.experiment.optimizer.values())
    params = program.init(0)["params"]
    state = transform.init(params)
    _, state = transform.update(jax.tree.map(lambda leaf: 1e3 * jnp.ones_like(leaf), params), state, params)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(state[1].mu)))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_learning_rate_groups(tmp_path):
    experiment = tiny(tmp_path)
    experiment = chz.replace(
        experiment,
        model=chz.replace(experiment.model, stages=repeat(Hyena(maximum_length=16, filter_order=8), depth=1)),
    )
    model = FunctionalModel(experiment.model, 32)
    groups = flatten(model.tags("group"))
    assert "filter" in groups.values()
    frozen = AdamW(groups=(GroupRate(group="filter", factor=0.0),), weight_decay=0.0)
    params = jax.jit(model.init)(jax.random.key(0))
    transform = frozen.transform(model, 10, frozen.values())
    updates, _ = transform.update(jax.tree.map(jnp.ones_like, params), transform.init(params), params)
    for name, update in flatten(updates).items():
        assert bool(jnp.all(update == 0)) == (groups[name] == "filter")
    with pytest.raises(UserError, match="groups names nothing"):
        AdamW(groups=(GroupRate(group="nothing", factor=0.0),)).transform(model, 10, frozen.values())
