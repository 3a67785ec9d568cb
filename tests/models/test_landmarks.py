"""Where landmarks stand, against a loop over the tokens in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.layers.mixer import Cursor
from recollect.layers.packing import document_positions
from recollect.models.landmarks import Layout, expanded_length, insert, layout, plain_layout, remove
from recollect.pallas_kernels.masks import LANDMARK, ORDINARY


def layout_by_hand(segments, positions, block):
    """(ordinary index or None, segment, position with landmarks counted, type) of each token the layers see, a row
    at a time."""
    found = []
    for index, (segment, position) in enumerate(zip(segments, positions, strict=True)):
        longer = position + position // block
        found.append((index, segment, longer if segment else None, ORDINARY))
        if segment and position % block == block - 1:
            found.append((None, segment, longer + 1, LANDMARK))
    return found


def assert_is_the_walk(place, segments, positions, block):
    for row in range(segments.shape[0]):
        tokens = layout_by_hand(segments[row].tolist(), positions[row].tolist(), block)
        length = place.context.segments.shape[1]
        assert len(tokens) <= length
        for slot in range(length):
            index, segment, position, kind = tokens[slot] if slot < len(tokens) else (None, 0, None, ORDINARY)
            assert int(place.context.segments[row, slot]) == segment
            assert int(place.context.token_types[row, slot]) == kind
            if segment:
                assert int(place.context.positions[row, slot]) == position
            if index is not None:
                assert int(place.slots[row, index]) == slot and int(place.source[row, slot]) == index


PACKED = np.array([[1] * 7 + [2] + [3] * 9 + [0] * 4, [0, 0, 0] + [5] * 13 + [0] + [6] * 4, [4] * 21], np.int32)


def compiled_layout(positions, segments, block, from_start):
    def parts(positions, segments):
        place = layout(positions, segments, block, from_start=from_start)
        return place.slots, place.source, place.context

    return Layout(*jax.jit(parts)(positions, jnp.asarray(segments)))


def from_start(segments, block):
    return compiled_layout(document_positions(jnp.asarray(segments)), segments, block, True)


@pytest.mark.parametrize("block", [1, 4, 30])
def test_packed_documents_from_their_start(block):
    positions = document_positions(jnp.asarray(PACKED))
    place = from_start(PACKED, block)
    assert place.context.segments.shape[1] == 21 + 21 // block
    assert_is_the_walk(place, PACKED, np.asarray(positions), block)


@pytest.mark.parametrize("block", [1, 3, 4, 30])
@pytest.mark.parametrize("t", [1, 6])
def test_streams_that_go_on_inside_a_block(block, t):
    start = np.arange(12, dtype=np.int32)
    cursor = Cursor(jnp.asarray(start), jnp.full(12, 7, jnp.int32))
    segments = np.full((12, t), 7, np.int32)
    if t > 1:
        segments[::3, 2] = 0  # padding inside the chunk
        segments[1::3, 3:] = 8  # a document ends in it
        segments[5] = 0  # a row that waits
    positions = document_positions(jnp.asarray(segments), cursor)
    place = compiled_layout(positions, segments, block, False)
    assert_is_the_walk(place, segments, np.asarray(positions), block)


@pytest.mark.parametrize(("t", "block"), [(1, 1), (1, 4), (4, 4), (13, 3)])
def test_the_plain_layout_is_the_general_one(t, block):
    ones = jnp.ones((2, t), jnp.int32)
    general, plain = from_start(ones, block), plain_layout(2, t, block)
    assert plain.context.segments is None and plain.context.positions is None  # the cheap path
    np.testing.assert_array_equal(plain.slots, general.slots)
    np.testing.assert_array_equal(plain.context.token_types, general.context.token_types)
    ordinary = np.asarray(plain.context.token_types) == ORDINARY
    np.testing.assert_array_equal(np.asarray(plain.source)[ordinary], np.asarray(general.source)[ordinary])
    assert plain.source.shape == (2, expanded_length(t, block)) == general.source.shape
    np.testing.assert_array_equal(
        general.context.positions, np.broadcast_to(np.arange(expanded_length(t, block)), plain.source.shape)
    )


def test_inserting_and_removing():
    segments = jnp.asarray(PACKED)
    place = from_start(segments, 4)
    x = jax.random.normal(jax.random.key(0), (3, 21, 5))
    vector = jnp.arange(5.0)
    longer = insert(x, vector, place)
    landmark = np.asarray(place.context.token_types) == LANDMARK
    assert landmark.sum() == (1 + 2) + (3 + 1) + 5  # whole blocks of each document
    np.testing.assert_array_equal(np.asarray(longer)[landmark], np.broadcast_to(vector, (12, 5)))
    np.testing.assert_array_equal(remove(longer, place), x)
    np.testing.assert_array_equal(
        remove(jnp.where(landmark[..., None], jnp.nan, longer), place), x
    )  # nothing of a landmark comes out
