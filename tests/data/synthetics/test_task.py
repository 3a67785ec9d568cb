"""What the base of tasks does for all of them, on a task small enough to count."""

import functools
import json

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.data.synthetics import MQAR, RecallSlice, Slice, SyntheticTask, arrays
from recollect.data.synthetics.finite_set import permuted
from recollect.data.synthetics.shared_programs import slices_like


@chz.chz(typecheck=True)
class NoisySlice(Slice):
    noise: float = 0.0


@chz.chz(typecheck=True)
class Echo(SyntheticTask):
    """Each token is its own label; groups tell early and late positions apart."""

    mixture: tuple[NoisySlice, ...] = (NoisySlice(length=4), NoisySlice(length=4, noise=0.5), NoisySlice(length=8))
    breakdown = "half"
    extrapolation: tuple[int, ...] = ()
    vocabulary = 1 << 30

    def group_names(self, slice):
        return ("early", "late")

    def sample(self, key, slice, batch_size):
        tokens = jax.random.randint(key, (batch_size, slice.length), 0, 1 << 30)
        groups = jnp.broadcast_to(2 * jnp.arange(slice.length) // slice.length, tokens.shape)
        return Batch(tokens, tokens, None, jnp.ones(tokens.shape), groups=groups)


def first_tokens(batch):
    return np.asarray(batch.tokens)[:, 0]


def test_a_permutation_of_each_size_takes_every_place_once():
    for size in (1, 3, 16, 100):
        order = jax.vmap(jax.vmap(functools.partial(permuted, size=size), in_axes=(None, 0)), in_axes=(0, None))
        orders = np.asarray(order(jax.random.split(jax.random.key(size), 2), jnp.arange(size, dtype=jnp.uint32)))
        assert (np.sort(orders) == np.arange(size)).all()
    assert (orders[0] != orders[1]).any()


def test_a_finite_set_is_taken_once_an_epoch_in_another_order_whatever_the_batch_size():
    part = NoisySlice(length=4)
    task = Echo(train_examples=20)
    draw = jax.jit(lambda step, size: task.train_batch(3, step, part, size), static_argnums=1)
    small = np.concatenate([first_tokens(draw(step, 5)) for step in range(12)]).reshape(3, 20)
    assert len(np.unique(small)) == 20 and all(set(epoch) == set(small[0]) for epoch in small)
    assert (small[0] != small[1]).any() and (small[1] != small[2]).any()
    np.testing.assert_array_equal(small.reshape(5, 12), [first_tokens(draw(step, 12)) for step in range(5)])
    assert not set(small[0]) & set(first_tokens(task.evaluation_batch(3, 0, part, 64)))


def test_slices_of_one_shape_share_a_program_and_no_stream():
    task = Echo()
    quiet, noisy, long = task.train_slices()
    assert slices_like(task, noisy) == (quiet, noisy) and slices_like(task, long) == (long,)
    names = ("4x0", "4x0.5", "8x0")
    assert tuple(part.name for part in task.train_slices()) == names
    tokens = [first_tokens(task.train_batch(0, 0, part, 32)) for part in task.train_slices()]
    assert len(np.unique(tokens)) == 96


def test_scores_count_labels_answers_and_groups():
    task = Echo()
    weights = jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    correct = jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    batch = task.sample(jax.random.key(0), NoisySlice(length=4), 3)
    batch = Batch(batch.tokens, batch.targets, None, weights, groups=batch.groups)
    scores = jax.tree.map(np.asarray, task.scores((NoisySlice(length=4),), batch, correct, 2 * correct))
    assert scores["accuracy"] == (5, 6) and scores["exact"] == (1, 2) and scores["loss"] == (10, 6)
    np.testing.assert_array_equal(scores["accuracy_by_half"], [(4, 1), (4, 2)])
    assert task.shares_by_group(NoisySlice(length=4), *scores["accuracy_by_half"]) == {"early": 1.0, "late": 0.5}


def test_extrapolated_slices_are_reported_beside_the_mean():
    task = Echo(extrapolation=(2, 4))
    assert [(part.name, part.weight) for part in task.evaluation_slices()[2:]] == [("8x0", 1), ("16x0", 0), ("32x0", 0)]
    assert task.longest == 32 and task.lengths == [4, 8, 16, 32]
    values = dict(zip(("4x0", "4x0.5", "8x0", "16x0", "32x0"), (0.5, 1.0, 0.75, 0.0, 0.0), strict=True))
    assert task.mean(values) == 0.75
    twice = MQAR(vocab_size=256, length=64, pairs=8, extrapolation=(2,))
    assert [part.name for part in twice.evaluation_slices()] == ["64x8", "128x16"]
    with pytest.raises(UserError, match="vocab_size=256: must be larger than the length, 512"):
        MQAR(vocab_size=256, length=64, pairs=8, extrapolation=(2, 8))
    with pytest.raises(UserError, match="factors must be above 1"):
        Echo(extrapolation=(1,))


def test_a_result_says_sizes_and_chance_of_every_slice():
    task = MQAR(vocab_size=256, evaluation=(RecallSlice(length=64, pairs=4), RecallSlice(length=128, pairs=8)))
    sizes = {"64x4": {"length": 64, "pairs": 4}, "128x8": {"length": 128, "pairs": 8}}
    chances = {"64x4": 1 / 128, "128x8": 1 / 128}
    assert task.result_entries() == {"slices": sizes, "chance": 1 / 128, "chance_by_slice": chances}
    assert "chance" not in Echo().result_entries()
    json.dumps(Echo().result_entries())


def test_a_task_as_a_library_gives_arrays():
    task = MQAR(vocab_size=64, length=32, pairs=4)
    tokens, labels = arrays(task, step=3, batch_size=5, seed=2)
    batch = jax.device_get(task.train_batch(2, 3, None, 5))
    assert tokens.dtype == labels.dtype == np.int32 and tokens.shape == labels.shape == (5, 32)
    np.testing.assert_array_equal(tokens, batch.tokens)
    np.testing.assert_array_equal(np.take_along_axis(labels, batch.target_positions, 1), batch.targets)
    assert (labels == -100).sum() == 5 * (32 - 4)
    held_out, _ = arrays(task, step=3, batch_size=5, seed=2, role="evaluation")
    assert (held_out != tokens).any()
    dense, everywhere = arrays(Echo(), step=0, batch_size=2)
    np.testing.assert_array_equal(dense, everywhere)
