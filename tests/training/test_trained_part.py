"""Frozen parameters: no step, no decay, no optimizer state, with every optimizer."""

import jax
import numpy as np
import pytest

from recollect.configuration import UserError, apply_overrides
from recollect.configuration.io import flatten
from recollect.training.step import Program, member_values
from tests.training.tiny import tiny


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_frozen_parameters_stay_and_have_no_state(tmp_path, optimizer):
    settings = ["optimizer.weight_decay=0.5", "optimizer.decay_everything=True", "optimizer.clip=1.0"]
    frozen = "optimizer.frozen=embedding,stack.stages.0.0"
    experiment = apply_overrides(tiny(tmp_path), [f"optimizer={optimizer}", *settings, frozen])
    program = Program(experiment)
    state = program.init(0)
    before = flatten(jax.device_get(state["params"]))
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state["opt_state"])}
    assert not [name for name in names if "'embedding'" in name or "['0']['0']" in name] and len(names) > 4
    state, metrics = program.train(state, member_values([experiment], False), 2, experiment.data.slice_for(0, 0))
    after = flatten(jax.device_get(state["params"]))
    stayed = {name for name in before if np.array_equal(before[name], after[name])}
    assert stayed == {name for name in before if name == "embedding" or name.startswith("stack.stages.0.0.")}
    assert np.all(np.asarray(metrics["gradient_norm"]) > 0)


def test_something_must_be_trained(tmp_path):
    with pytest.raises(UserError, match="leaves no parameter to train"):
        Program(apply_overrides(tiny(tmp_path), ["optimizer.frozen=*"]))
