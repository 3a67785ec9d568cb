"""Examples of NewTask are what they should be, and repeat with their seed."""

import jax
import numpy as np

from recollect.data.synthetics import NewTask


def test_examples():
    task = NewTask(length=8)
    batch = task.train_batch(0, 3, task.train_slices()[0], 4)
    tokens, targets, positions = map(np.asarray, (batch.tokens, batch.targets, batch.target_positions))
    np.testing.assert_array_equal(tokens[:, :4], tokens[:, 4:])
    np.testing.assert_array_equal(targets, np.take_along_axis(tokens, positions + 1, axis=1))


def test_streams_repeat_and_differ():
    task = NewTask(length=8)
    part = task.train_slices()[0]
    first, again, later = (task.train_batch(0, step, part, 4).tokens for step in (0, 0, 1))
    held_out = task.evaluation_batch(0, 0, part, 4).tokens
    assert (first == again).all() and (first != later).any() and (first != held_out).any()
    assert jax.tree.map(np.shape, task.batch_shapes(4)) == jax.tree.map(np.shape, task.train_batch(0, 0, part, 4))
