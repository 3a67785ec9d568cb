"""Members trained at once equal members trained alone: a step's gradients to 1e-6, and the ends of runs within
rounding's reach."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.training.checkpoint.load import load_params
from recollect.training.experiment import program_of
from recollect.training.step import Program, member_values
from recollect.training.sweeps.population import train_members
from recollect.training.train import train
from tests.training.tiny import tiny

POINTS = [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)]


def members(folder, **run):
    return [tiny(folder / f"{rate}-{seed}", learning_rate=rate, seed=seed, **run) for rate, seed in POINTS]


def test_experiments_that_differ_in_values_share_a_program(tmp_path):
    a, b = tiny(tmp_path / "a"), tiny(tmp_path / "b", learning_rate=0.5, seed=9)
    assert program_of(a) == program_of(b)
    assert program_of(a) != program_of(chz.replace(a, run=chz.replace(a.run, batch_size=8)))


def test_one_steps_gradients_equal_the_lone_runs(tmp_path):
    experiments = members(tmp_path)
    lone, many = Program(experiments[0]), Program(experiments[0], len(POINTS))
    states = many.init([seed for _, seed in POINTS])
    data = experiments[0].data

    def gradients(state):
        batch = data.train_batch(state["seed"], state["step"], data.train_slices()[0], 16)
        return lone.gradients(state["params"], batch, None)[0]

    stacked = jax.jit(jax.vmap(gradients))(states)
    for index, (_, seed) in enumerate(POINTS):
        alone = jax.jit(gradients)(lone.init(seed))
        for found, expected in zip(jax.tree.leaves(stacked), jax.tree.leaves(alone), strict=True):
            scale = max(float(jnp.max(jnp.abs(expected))), 1e-6)
            assert float(jnp.max(jnp.abs(found[index] - expected))) <= 1e-6 * scale + 1e-9


def test_a_members_bits_do_not_depend_on_its_mates(tmp_path):
    program = Program(tiny(tmp_path), 2)
    part = program.experiment.data.train_slices()[0]

    def end(rates, seeds):
        experiments = [tiny(tmp_path, learning_rate=rate, seed=seed) for rate, seed in zip(rates, seeds, strict=True)]
        state, _ = program.train(program.init(seeds), member_values(experiments, True), 20, part)
        return jax.device_get(state["params"])

    first, second = end([1e-2, 1e-3], [3, 4]), end([1e-2, 3e-2], [3, 8])
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert not np.array_equal(a[1], b[1])


def test_together_ends_where_runs_in_turn_end(tmp_path):
    together = train_members(members(tmp_path / "together"), together=True, log=lambda text: None)
    in_turn = train_members(members(tmp_path / "in_turn"), together=False, log=lambda text: None)
    for a, b in zip(together, in_turn, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert abs(a["accuracy"] - b["accuracy"]) <= 0.02
        assert (a["learning_rate"], a["seed"], a["steps"]) == (b["learning_rate"], b["seed"], b["steps"])


def test_members_that_stop_early_are_frozen(tmp_path):
    lines: list[str] = []
    # Accuracy 0 is reached at the first evaluation by everyone; none can reach 2.
    first = train_members(members(tmp_path, stop_at_accuracy=0.0), together=True, log=lines.append)
    assert all(result["status"] == "stopped early" and result["steps"] == 20 for result in first)


def test_a_frozen_member_keeps_its_parameters_while_others_go_on(tmp_path):
    experiments = members(tmp_path, stop_at_accuracy=0.05)
    results = train_members(experiments, together=True, log=lambda text: None)
    stopped = [index for index, result in enumerate(results) if result["status"] == "stopped early"]
    going = [index for index, result in enumerate(results) if result["status"] == "finished"]
    assert stopped and going, "the setting must have both kinds of members"
    for index in stopped:
        params, _, step = load_params(tmp_path / f"{POINTS[index][0]}-{POINTS[index][1]}" / "checkpoints")
        assert step == results[index]["steps"] < 60
        program = Program(experiments[0])
        alone, _ = program.train(
            program.init(POINTS[index][1]),
            member_values([experiments[index]], False),
            step,
            experiments[0].data.train_slices()[0],
        )
        for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(alone["params"]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_population_resumes_with_the_same_bits_and_skips_what_is_done(tmp_path):
    whole = train_members(members(tmp_path / "whole"), together=True, log=lambda text: None)
    half = members(tmp_path / "half")
    stopped = [chz.replace(member, run=chz.replace(member.run, steps=60)) for member in half]

    class Stop(Exception):
        pass

    def stop_at_40(text):
        if "step 40" in text:
            raise Stop

    with pytest.raises(Stop):
        train_members(stopped, together=True, log=stop_at_40)
    lines: list[str] = []
    resumed = train_members(half, together=True, log=lines.append)
    assert any("resumed at step 20" in line for line in lines)
    for a, b in zip(whole, resumed, strict=True):
        assert (a["loss"], a["accuracy"]) == (b["loss"], b["accuracy"])
    for rate, seed in POINTS:
        one, _, _ = load_params(tmp_path / "whole" / f"{rate}-{seed}" / "checkpoints")
        two, _, _ = load_params(tmp_path / "half" / f"{rate}-{seed}" / "checkpoints")
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_array_equal(a, b)
    lines.clear()
    train_members(half, together=True, log=lines.append)
    assert len([line for line in lines if "already finished" in line]) == 4


def test_members_that_have_ended_are_left_alone_when_others_join(tmp_path):
    experiments = members(tmp_path)
    before = train_members(experiments[:2], together=True, log=lambda text: None)
    lines: list[str] = []
    results = train_members(experiments, together=True, log=lines.append)
    assert results[:2] == before and [result["steps"] for result in results[2:]] == [60, 60]
    assert len([line for line in lines if "already finished" in line]) == 2
    assert any("2 members at once" in line for line in lines)


def test_a_lone_run_is_skipped_when_done_and_goes_on_when_asked_for_more(tmp_path):
    lines: list[str] = []
    train(tiny(tmp_path / "run"), log=lines.append)
    again = train(tiny(tmp_path / "run"), log=lines.append)
    assert "already finished" in lines[-1] and again["steps"] == 60
    more = train(tiny(tmp_path / "run", steps=80), log=lines.append)
    assert more["steps"] == 80 and any("resumed at step 60" in line for line in lines)
