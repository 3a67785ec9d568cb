"""The lists of visits that TPU kernels visit_list, against loops over random schedules."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.pallas_kernels.scheduled_attention import tpu_grid
from recollect.pallas_kernels.scheduled_attention.block_schedule import EMPTY, FULL, PARTIAL, BlockSchedule

SHAPES = [(1, 1, 1), (2, 3, 4), (1, 4, 2), (3, 2, 5)]


@st.composite
def any_kinds(draw, shapes=tuple(SHAPES)):
    """(b', tiles, others) of kinds."""
    shape = draw(st.sampled_from(shapes))
    numbers = draw(
        st.lists(st.sampled_from([EMPTY, PARTIAL, FULL]), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))
    )
    return np.array(numbers, np.int8).reshape(shape)


def steps_of(kinds: np.ndarray) -> list[list[tuple[int, int | None, int]]]:
    """For each sequence its steps: own tile, other tile or None, and flags."""
    found: list[list[tuple[int, int | None, int]]] = []
    for rows in kinds:
        found.append([])
        for own, row in enumerate(rows):
            others: list[Any] = list(np.flatnonzero(row)) or [None]
            for place, other in enumerate(others):
                flags = tpu_grid.FIRST * (place == 0) + tpu_grid.LAST * (place == len(others) - 1)
                if other is not None:
                    flags += tpu_grid.VISITED + tpu_grid.MASKED * (row[other] == PARTIAL)
                found[-1].append((own, other, flags))
    return found


def check_list(visit_list: tpu_grid.VisitList, expected: list[list[tuple[int, int | None, int]]]) -> None:
    steps = np.asarray(visit_list.steps).reshape(len(expected), visit_list.most)
    assert int(visit_list.longest) == max(map(len, expected)) <= visit_list.most
    for row, wanted in zip(steps, expected, strict=True):
        for step, (own, other, flags) in zip(row, wanted, strict=False):
            assert (tpu_grid.resident_tile(step), step & 15) == (own, flags)
            assert other is None or tpu_grid.visited_tile(step) == other
        last = row[len(wanted) - 1]
        for step in row[len(wanted) :]:  # idle, and nothing new to fetch
            assert step & 15 == 0 and step >> 4 == last >> 4


def as_schedule(kinds) -> BlockSchedule:
    return BlockSchedule(
        kinds, (kinds != EMPTY).any(axis=0) if isinstance(kinds, np.ndarray) else np.ones(kinds.shape[1:], bool)
    )


def lists(kinds, group: int) -> tuple[tpu_grid.VisitList, ...]:
    """Over keys and over queries, and so with `group` tiles of keys as one."""
    schedule = as_schedule(kinds)
    visits, transposed = schedule.visits(), schedule.transposed()
    grouped = (
        tpu_grid.by_groups(visits, kinds.shape[2], group, False),
        tpu_grid.by_groups(transposed, kinds.shape[1], group, True),
    )
    return tuple(tpu_grid.visit_list(x, 5) for x in (visits, transposed, *grouped))


@functools.cache
def on_the_device(group: int):
    """`lists` of traced kinds: their arrays, jitted, and what was static when they were traced."""
    static: list[tuple[tpu_grid.VisitList, ...]] = []

    @jax.jit
    def run(kinds):
        static.append(lists(kinds, group))
        return [(visit_list.steps, visit_list.longest) for visit_list in static[-1]]

    return run, static


@settings(max_examples=25, deadline=None, derandomize=True)
@given(any_kinds(), st.integers(1, 3))
def test_a_walk_is_all_visits_one_after_another(kinds, group):
    padded = np.pad(kinds, ((0, 0), (0, 0), (0, -kinds.shape[2] % group)), constant_values=EMPTY).reshape(
        *kinds.shape[:2], -1, group
    )
    joined = np.where((padded == EMPTY).all(axis=3), EMPTY, np.where((padded == FULL).all(axis=3), FULL, PARTIAL))
    for visit_list, wanted in zip(
        lists(kinds, group), (kinds, kinds.swapaxes(1, 2), joined, joined.swapaxes(1, 2)), strict=True
    ):
        check_list(visit_list, steps_of(wanted))
        assert (visit_list.masked, visit_list.unmasked) == ((wanted == PARTIAL).any(), (wanted == FULL).any())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(any_kinds((SHAPES[1],)))
def test_a_walk_made_on_the_device_is_the_same(kinds):
    run, static = on_the_device(2)
    found = run(kinds)
    joined = kinds.reshape(*kinds.shape[:2], -1, 2)
    joined = np.where((joined == EMPTY).all(axis=3), EMPTY, np.where((joined == FULL).all(axis=3), FULL, PARTIAL))
    expected = (kinds, kinds.swapaxes(1, 2), joined, joined.swapaxes(1, 2))
    for visit_list, (steps, longest), wanted in zip(static[0], found, expected, strict=True):
        check_list(dataclasses.replace(visit_list, steps=steps, longest=longest), steps_of(wanted))


@functools.cache
def by_key_head(heads: int):
    static: list[tpu_grid.VisitList] = []

    @jax.jit
    def run(kinds, key_heads):
        static.append(tpu_grid.visit_list(as_schedule(kinds).transposed(key_heads, heads), 5))
        return static[-1].steps, static[-1].longest

    return run, static


@settings(max_examples=15, deadline=None, derandomize=True)
@given(any_kinds((SHAPES[1],)), st.data())
def test_a_walk_over_gathered_queries_takes_key_head_after_key_head(kinds, data):
    heads = 3
    own = np.array(data.draw(st.lists(st.integers(0, heads - 1), min_size=kinds.shape[1], max_size=kinds.shape[1])))
    run, static = by_key_head(heads)
    steps, longest = run(kinds, np.tile(own, (len(kinds), 1)))
    by_head = [np.where(own[:, None] == head, kinds, EMPTY).swapaxes(1, 2) for head in range(heads)]
    visit_list = dataclasses.replace(static[0], steps=steps, longest=longest)
    check_list(visit_list, steps_of(np.concatenate(by_head, axis=1)))


def test_more_tiles_than_a_step_can_name_are_told():
    for tiles, others in ((8193, 1), (1, 16385)):
        visits = as_schedule(np.ones((1, tiles, 1), np.int8)).visits()
        with pytest.raises(
            ValueError, match=f"{max(tiles, others)} tiles are more than the {max(tiles, others) - 1} that"
        ):
            tpu_grid.visit_list(visits, others)
