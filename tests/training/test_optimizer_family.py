"""SGD, Lion and Adafactor: their steps against their papers' equations, runs that resume, and states over a mesh."""

import chz
import jax
import numpy as np
import pytest

from recollect.configuration import UserError, from_json, to_json
from recollect.models.functional import flatten
from recollect.training.adafactor import Adafactor
from recollect.training.experiment import Mesh, program_of
from recollect.training.lion import Lion
from recollect.training.sgd import SGD
from recollect.training.step import Program, member_values
from recollect.training.train import train
from tests.training.test_optimizer import model, normal_like, updates_of  # noqa: F401 - a fixture
from tests.training.tiny import tiny

PLAIN = {"learning_rate": 1.0, "schedule": "constant", "weight_decay": 0.0}
OPTIMIZERS = [SGD(learning_rate=1e-2), Lion(learning_rate=1e-3), Adafactor(learning_rate=1e-2, factored_from=4)]


@pytest.mark.parametrize(("nesterov", "factor"), [(False, 1 + 0.9), (True, 1 + 0.9 * (1 + 0.9))])
def test_sgds_second_step_has_the_momentum_of_the_first(model, nesterov, factor):  # noqa: F811
    grads = normal_like(model)
    updates = updates_of(SGD(momentum=0.9, nesterov=nesterov, **PLAIN), model, grads, steps=2)
    for name, grad in flatten(grads).items():
        np.testing.assert_allclose(updates[name], -factor * grad, rtol=1e-5, atol=1e-6, err_msg=name)


def test_lions_step_is_a_sign(model):  # noqa: F811
    grads = normal_like(model)
    updates = updates_of(Lion(**PLAIN), model, grads, steps=3)
    for name, grad in flatten(grads).items():
        np.testing.assert_array_equal(updates[name], -np.sign(grad), err_msg=name)


def test_adafactor_keeps_rows_and_columns_and_bounds_each_layers_update(model):  # noqa: F811
    grads = normal_like(model)
    updates = updates_of(Adafactor(factored_from=8, update_clip=0.5, **PLAIN), model, grads)
    name = "stack.stages.0.0.mixer.query.kernel"
    for layer, grad in enumerate(flatten(grads)[name].astype(np.float64)):
        rows, columns = (grad**2).mean(1, keepdims=True), (grad**2).mean(0, keepdims=True)
        scaled = grad / np.sqrt(rows * columns / rows.mean())  # equation of section 4: V = R C / sum(R)
        expected = scaled / max(1.0, np.sqrt((scaled**2).mean()) / 0.5)
        np.testing.assert_allclose(updates[name][layer], -expected, rtol=1e-4)
    for name, update in flatten(updates).items():
        rank = len(flatten(model.tags("dims"))[name].split())
        sizes = np.sqrt((np.asarray(update) ** 2).mean(tuple(range(update.ndim - rank, update.ndim))))
        assert sizes.max() <= 0.5 + 1e-5, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
def test_a_run_resumes_with_the_same_bits(tmp_path, optimizer):
    def experiment(folder, steps):
        made = tiny(
            tmp_path / folder, steps=steps, batch_size=4, steps_per_call=1, checkpoint_every=1, evaluate_every=2
        )
        return chz.replace(made, optimizer=chz.replace(optimizer, schedule="constant"))

    assert from_json(to_json(experiment("json", 2))) == experiment("json", 2)
    whole = train(experiment("whole", 2), log=lambda text: None)
    train(experiment("parts", 1), log=lambda text: None)
    lines: list[str] = []
    parts = train(experiment("parts", 2), log=lines.append)
    assert any("resumed at step 1" in line for line in lines) and parts["loss"] == whole["loss"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
def test_two_steps_over_a_mesh_equal_those_on_one_device(tmp_path, optimizer):
    ends = []
    for mesh in (Mesh(), Mesh(fsdp=2, tensor=2)):
        experiment = chz.replace(tiny(tmp_path, mesh=mesh), optimizer=optimizer)
        program = Program(experiment)
        state, _ = program.train(
            program.init(0), member_values([experiment], False), 2, experiment.data.train_slices()[0]
        )
        ends.append(jax.device_get(state["params"]))
    kernel = flatten(state["params"])["stack.stages.0.1.mixer.query.kernel"]
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state["opt_state"])
        if jax.tree_util.keystr(path).endswith("['mixer']['query']['kernel']") and leaf.shape == kernel.shape
    ]
    assert bool(moments) != isinstance(optimizer, Adafactor)  # its rows and columns are small and whole everywhere
    assert all(leaf.sharding.spec == kernel.sharding.spec for leaf in moments) and "fsdp" in kernel.sharding.spec
    tolerance = {"rtol": 1e-3, "atol": 5e-3 if isinstance(optimizer, Lion) else 1e-4}  # a sign near 0 may flip
    for one, many in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(one, many, **tolerance)


def test_values_share_a_program(tmp_path):
    def program(optimizer):
        return program_of(chz.replace(tiny(tmp_path), optimizer=optimizer))

    assert program(SGD(momentum=0.5)) == program(SGD(momentum=0.8)) != program(SGD(nesterov=True))
    assert program(Lion(beta2=0.9)) == program(Lion(learning_rate=1.0))


@pytest.mark.parametrize("optimizer", [SGD, Lion, Adafactor])
def test_a_learning_rate_is_finite(optimizer):
    with pytest.raises(UserError, match="learning_rate=inf: must be positive and finite"):
        optimizer(learning_rate=float("inf"))
