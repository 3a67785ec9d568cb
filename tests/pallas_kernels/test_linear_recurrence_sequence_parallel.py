"""What each span of a sequence adds to the state, found alone, is joined to the states that truly enter the spans."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels.linear_recurrence import Recurrence, sequence_parallel, xla
from recollect.pallas_kernels.segments import carry_segments
from tests.pallas_kernels.test_linear_recurrence import error
from tests.pallas_kernels.test_linear_recurrence_family import arguments


@pytest.mark.parametrize(
    "case",
    [
        (None, None, False),
        ("token", None, True),
        ("channel", None, True),
        (None, "scalar", False),
        ("token", "vector", True),
        ("channel", "apart", True),
        ("channel", None, True, "channel"),
    ],
)
def test_joined_states_are_those_of_the_whole(case):
    decay, erase, packed, *columns = case
    spans, length = 3, 17
    given, fixed = arguments(spans * length, decay, erase, True, packed, *columns)
    first = given.pop("initial_state")

    @jax.jit
    def alone(inputs):
        if erase is None:
            return sequence_parallel.state_from_zero(inputs)
        return *sequence_parallel.state_and_transition(xla.linear_recurrence, inputs), None

    @jax.jit
    def after(inputs, state):
        return xla.linear_recurrence(dataclasses.replace(inputs, initial_state=state), return_state=True)[1]

    states, keeps, columns, expected, before = [], [], [], [jnp.asarray(first)], fixed.get("initial_segment")
    for start in range(0, spans * length, length):
        rows = {name: jnp.asarray(x[:, start : start + length]) for name, x in given.items()}
        segments = jnp.asarray(fixed["segment_ids"][:, start : start + length]) if packed else None
        inputs = Recurrence(**rows, segment_ids=segments, initial_segment=before)
        if packed:
            before = carry_segments(segments, jnp.asarray(before))[:, -1]
        state, keep, column = alone(inputs)
        states.append(state)
        keeps.append(keep)
        columns.append(column)
        expected.append(after(inputs, expected[-1]))
    columns = None if columns[0] is None else jnp.stack(columns, axis=1)
    joined = sequence_parallel.entering_states(
        jnp.stack(states, axis=1), jnp.stack(keeps, axis=1), jnp.asarray(first), columns
    )
    assert error(joined, jnp.stack(expected, axis=1)) < 1e-5


@pytest.mark.parametrize("spans", [1, 3, 20])
def test_entering_with_every_kind_of_factor(spans):
    rng = np.random.default_rng(spans)
    b, h, k, v = 2, 3, 4, 5
    states = rng.normal(size=(b, spans, h, k, v)).astype(np.float32)
    for shape in ((1, 1, 1), (h, 1, 1), (h, k, 1), (h, 1, v), (h, k, k)):
        keeps = rng.random((b, spans, *shape)).astype(np.float32) / 2
        state = rng.normal(size=(b, h, k, v)).astype(np.float32)
        joined = jax.jit(sequence_parallel.entering)(states, keeps, state)
        for span in range(spans + 1):
            np.testing.assert_allclose(joined[:, span], state, rtol=1e-5, atol=1e-5)
            if span < spans:
                kept = keeps[:, span] @ state if shape == (h, k, k) else keeps[:, span] * state
                state = kept + states[:, span]


def test_padding_full_of_nan_adds_nothing():
    given, fixed = arguments(31, "channel", None, False, True, "channel")
    strength = np.random.default_rng(3).random(given["v"].shape).astype(np.float32)
    given["write_strength"] = strength
    segments = {"segment_ids": jnp.asarray(fixed["segment_ids"]), "initial_segment": jnp.zeros(2, jnp.int32)}
    real = fixed["segment_ids"] != 0

    def total(rows):
        return sum(jnp.sum(jnp.sin(x)) for x in sequence_parallel.state_from_zero(Recurrence(**rows, **segments)))

    gradient = jax.value_and_grad(total)
    clean = gradient(given)
    ruined = gradient(
        {name: np.where(real.reshape(2, 31, *[1] * (x.ndim - 2)), x, np.nan) for name, x in given.items()}
    )
    jax.tree.map(np.testing.assert_array_equal, clean, ruined)
