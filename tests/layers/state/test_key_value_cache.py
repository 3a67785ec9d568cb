"""The decode cache against a list of what was appended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.layers.mixer import Context
from recollect.layers.state import window_cache
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.layers.state.window_cache import WindowCache

APPEND = jax.jit(lambda cache, keys, values, segments: _append(cache, keys, values, segments))


def _append(cache, keys, values, segments):
    tokens, cursor = cache.cursor.read(Context(segments=segments), *segments.shape)
    return cache.append(keys, values, tokens, cursor)


def stream(b: int, chunks: int, t: int, seed: int) -> np.ndarray:
    """Segments (chunks, b, t): documents that go on over calls, padding anywhere, rows at their own pace."""
    rng = np.random.default_rng(seed)
    ids = 1 + np.cumsum(rng.random((b, chunks * t)) < 0.12, axis=1)
    ids[rng.random(ids.shape) < 0.3] = 0
    return ids.reshape(b, chunks, t).swapaxes(0, 1).astype(np.int32)


def filled(cache: KeyValueCache, segments: np.ndarray):
    """Appends all chunks; a token's key is its number, its value minus that. Also per row the tokens in order:
    (number, segment, position)."""
    appended: list[list[tuple[int, int, int]]] = [[] for _ in range(segments.shape[1])]
    number = 0
    for chunk in segments:
        numbers = number + np.arange(1, chunk.size + 1).reshape(chunk.shape)
        number += chunk.size
        keys = jnp.asarray(np.where(chunk != 0, numbers, np.nan), jnp.float32)[..., None, None]
        cache = APPEND(cache, keys, -keys, jnp.asarray(chunk))
        for row, found in enumerate(appended):
            for n, segment in zip(numbers[row], chunk[row], strict=True):
                if segment:
                    position = found[-1][2] + 1 if found and found[-1][1] == segment else 0
                    found.append((int(n), int(segment), position))
    return cache, appended


def stored(cache: KeyValueCache, row: int) -> list[tuple[int, int, int]]:
    """(number, segment, position) of each taken slot, in slot order; keys and values must agree."""
    fields = cache.fields()
    keys, values = np.asarray(cache.keys)[row, :, 0, 0], np.asarray(cache.values)[row, :, 0, 0]
    taken = np.flatnonzero(np.asarray(fields.segments)[row])
    np.testing.assert_array_equal(keys[taken], -values[taken])
    return [(int(keys[i]), int(fields.segments[row, i]), int(fields.positions[row, i])) for i in taken]


@pytest.mark.parametrize("seed", [0, 1])
def test_everything_is_kept_in_order(seed):
    segments = stream(3, 4, 5, seed)
    cache, appended = filled(KeyValueCache.create(3, 20, 1, 1, 1, jnp.float32), segments)
    for row, expected in enumerate(appended):
        assert stored(cache, row) == expected  # ragged rows leave no gaps
        assert int(cache.count[row]) == len(expected)
        assert (int(cache.cursor.segment[row]), int(cache.cursor.position[row])) == (
            expected[-1][1],
            expected[-1][2] + 1,
        )
    assert np.isfinite(np.asarray(cache.keys)).all()  # NaN in padding was not written


def test_tokens_past_the_end_are_dropped():
    segments = np.ones((3, 1, 5), np.int32)
    cache, appended = filled(KeyValueCache.create(1, 7, 1, 1, 1, jnp.float32), segments)
    assert stored(cache, 0) == appended[0][:7]


@pytest.mark.parametrize(("slots", "t"), [(4, 1), (4, 5), (3, 11)])
def test_a_ring_keeps_the_newest(slots, t):
    cache, appended = filled(WindowCache.create(2, slots, 1, 1, 1, jnp.float32), stream(2, 22 // t, t, 2))
    for row, expected in enumerate(appended):
        assert sorted(stored(cache, row)) == expected[-slots:]


@pytest.mark.parametrize(("kept", "t"), [(2, 1), (2, 5), (1, 11)])
def test_kept_slots_hold_the_documents_first_tokens(kept, t):
    slots = 3
    cache, appended = filled(WindowCache.create(3, slots, 1, 1, 1, jnp.float32, kept=kept), stream(3, 22 // t, t, 3))
    assert cache.keys.shape[1] == kept + slots
    for row, expected in enumerate(appended):
        now = expected[-1][1]
        others = [token for token in expected if token[2] >= kept][-slots:]
        first = [token for token in expected if token[1] == now and token[2] < kept]
        of_now = sorted(token for token in stored(cache, row) if token[1] == now)
        assert of_now == sorted(first + [token for token in others if token[1] == now])


def test_no_slot_is_written_twice_in_a_call(monkeypatch):
    """The order of a scatter's writes is not defined (on CPU the last one happens to win), so each slot must get one
    token."""
    written, write = [], window_cache.written

    def recording(cache, index, *rest):
        written.append(np.asarray(index))
        return write(cache, index, *rest)

    monkeypatch.setattr(window_cache, "written", recording)
    segments = jnp.asarray([[1] * 5 + [2] * 7, [3, 3, 3, 0, 4, 4, 5, 5, 6, 6, 6, 6]], jnp.int32)
    cache = WindowCache.create(2, 3, 1, 1, 1, jnp.float32, kept=2)
    x = jnp.ones((2, 12, 1, 1))
    _append(_append(cache, x[:, :5], x[:, :5], segments[:, :5]), x[:, 5:], x[:, 5:], segments[:, 5:])
    assert len(written) == 4  # ring and kept slots, two calls
    for row in (row for index in written for row in index):
        taken = row[row < 5]
        assert len(taken) == len(set(taken.tolist())), row
    assert all((index < 5).any() for index in written)


def test_dtype_is_the_one_asked_for():
    cache = KeyValueCache.create(1, 4, 2, 3, 5, jnp.bfloat16)
    after = APPEND(cache, jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2, 5)), jnp.ones((1, 2), jnp.int32))
    assert after.keys.dtype == after.values.dtype == jnp.bfloat16
    assert after.keys.shape == (1, 4, 2, 3) and after.values.shape == (1, 4, 2, 5)
    assert jax.tree.structure(after) == jax.tree.structure(cache)


def test_one_token_is_written_into_the_ring_and_nothing_is_copied_beside_it():
    cache = WindowCache.create(2, 8, 1, 4, 4, jnp.float32)
    token = jnp.ones((2, 1, 1, 4))
    tokens, cursor = cache.cursor.read(Context(), 2, 1)
    keys, _, fields, after = cache.remember(token, token, tokens, cursor)
    assert keys is after.keys and fields.positions is after.positions  # 8 slots, not 9
    assert after.count.tolist() == [1, 1]
