"""A step that is not finite leaves everything as it was, is counted, and stops the run's parameters after so many in
a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.training.host_batches import train_on
from recollect.training.step import Program, member_values
from tests.training.tiny import tiny


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(tiny(tmp_path_factory.mktemp("run"), stop_after_nonfinite=2))


def batch(program, step, broken=False):
    """The batch of a step, as one of a stack; a broken one has a weight that is no number."""
    data = program.experiment.data
    stacked = jax.tree.map(lambda leaf: np.array(leaf)[None], data.train_batch(0, step, data.train_slices()[0], 16))
    if broken:
        stacked.weights[0, 0, 0] = np.nan
    return stacked


def trained(program, steps, broken=()):
    """The state after these steps' batches, and the metrics, each a list."""
    values = member_values([program.experiment], False)
    state, rows = program.init(0), []
    for step in steps:  # one at a time, so that all tests share one compiled program
        state, metrics = train_on(program, state, values, batch(program, step, step in broken))
        rows.append(jax.device_get(metrics))
    return jax.device_get(state), {name: [float(row[name][0]) for row in rows] for name in rows[0]}


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_broken_step_is_skipped_with_the_bits_of_a_run_that_never_saw_it(program):
    state, metrics = trained(program, [0, 1, 2, 3], broken=[1])
    clean, _ = trained(program, [0, 2, 3])
    assert_same((state["params"], state["opt_state"]), (clean["params"], clean["opt_state"]))
    assert metrics["skipped"] == [0, 1, 0, 0] and not np.isfinite(metrics["loss"][1])
    assert (state["step"], clean["step"]) == (4, 3)
    assert state["skipped"] == {"total": 1, "in_row": 0} and clean["skipped"] == {"total": 0, "in_row": 0}


def test_after_so_many_in_a_row_the_parameters_stay(program):
    state, metrics = trained(program, [0, 1, 2, 3], broken=[1, 2])
    clean, _ = trained(program, [0])
    assert_same(state["params"], clean["params"])
    assert metrics["skipped"] == [0, 1, 1, 1] and np.isfinite(metrics["loss"][3])
    assert state["skipped"] == {"total": 3, "in_row": 3}


def test_a_gradient_that_overflows_is_skipped_though_the_loss_is_finite(program):
    state = program.init(0)
    state["params"]["final_norm"]["gain"] *= 1e25  # logits of 1e24; the norm of the embedding's gradient squares 1e25
    before = jax.device_get(state["params"])
    state, metrics = train_on(program, state, member_values([program.experiment], False), batch(program, 0))
    assert (
        np.isfinite(metrics["loss"]).all()
        and np.isinf(metrics["gradient_norm"]).all()
        and metrics["skipped"].tolist() == [1]
    )
    assert_same(jax.device_get(state["params"]), before)


def test_one_member_of_a_population_is_skipped_alone(program, tmp_path):
    many = Program(tiny(tmp_path, stop_after_nonfinite=2), 2)
    part = many.experiment.data.train_slices()[0]
    values = member_values([many.experiment] * 2, True)

    def end(poison):
        state = many.init([0, 1])
        gain = state["params"]["final_norm"]["gain"]
        state["params"]["final_norm"]["gain"] = gain.at[0].set(jnp.where(poison, jnp.nan, gain[0]))
        return jax.device_get(many.train(state, values, 4, part))

    (sick, sick_metrics), (well, well_metrics) = end(True), end(False)
    assert_same(*(jax.tree.map(lambda leaf: leaf[1], state["params"]) for state in (sick, well)))
    assert sick_metrics["skipped"].tolist() == [[1] * 4, [0] * 4] and not well_metrics["skipped"].any()
    assert sick["skipped"]["in_row"].tolist() == [4, 0]
