"""The laws of mixers that stream (see laws.py): `init_state` and `extend`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from recollect.layers.law_subject import (
    DOCUMENTS,
    FP32,
    LENGTH,
    WIDTH,
    Subject,
    inputs,
    require,
    require_close,
    require_refusal,
)
from recollect.layers.mixer import Context, State
from recollect.layers.state import bounded_parts, check_capacity, overfull


def law_2_streaming(subject: Subject) -> None:
    """Tokens given to `extend` one by one, or 21 at a time, give the outputs of the whole sequence."""
    x = inputs(LENGTH)
    expected = subject.call(x)
    for size in (1, 21):
        state, outs = subject.init_state(2, LENGTH), []
        for start in range(0, LENGTH, size):
            out, state = subject.extend(x[:, start : start + size], state)
            outs.append(out)
        what = f"extend with {size} token{'s' if size > 1 else ''} per call differs from the whole sequence"
        require_close(jnp.concatenate(outs, axis=1), expected, FP32, what)


def law_2_streaming_ragged(subject: Subject) -> None:
    """Rows advance by different numbers of tokens per call; padding stands left, right and between; documents end
    inside calls."""
    x = np.asarray(inputs(LENGTH))
    expected = np.asarray(subject.call(jnp.asarray(x), Context(segments=jnp.asarray(DOCUMENTS))))
    state = subject.init_state(2, LENGTH, Context(segments=jnp.asarray(DOCUMENTS)))
    rng = np.random.default_rng(0)
    size, done = 9, [0, 0]
    streamed = np.zeros_like(expected)
    real = [int((row != 0).sum()) for row in DOCUMENTS]
    while any(d < r for d, r in zip(done, real, strict=True)):
        chunk_x = np.full((2, size, WIDTH), np.nan, np.float32)
        chunk_segments = np.zeros((2, size), np.int32)
        places = []
        for row in range(2):
            count = min(int(rng.integers(0, size + 1)), real[row] - done[row])
            slots = np.sort(rng.choice(size, count, replace=False))
            source = np.arange(done[row], done[row] + count)
            chunk_x[row, slots] = x[row, source]
            chunk_segments[row, slots] = DOCUMENTS[row, source]
            places.append((slots, source))
            done[row] += count
        out, state = subject.extend(jnp.asarray(chunk_x), state, Context(segments=jnp.asarray(chunk_segments)))
        for row, (slots, source) in enumerate(places):
            streamed[row, source] = np.asarray(out)[row, slots]
    mask = (DOCUMENTS != 0)[..., None]
    what = "extend, with rows that advance by different numbers of tokens, differs from the whole packed rows"
    require_close(np.where(mask, streamed, 0), np.where(mask, expected, 0), FP32, what)


def law_6_state_size(subject: Subject) -> None:
    """A state has the bytes that its shapes say, and keeps its structure, shapes and dtypes."""
    for length in (32, 128):
        state = subject.init_state(1, length)
        measured = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
        stated = _bytes(jax.eval_shape(lambda length=length: subject.init_state(1, length)))
        require(stated == measured, f"init_state for {length} tokens: {measured} bytes, its shapes say {stated}")
        _, after = subject.extend(inputs(3, b=1), state)
        was, now = str(jax.tree.structure(state)), str(jax.tree.structure(after))
        require(was == now, f"extend changes the state's structure from {was} to {now}")
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(after), strict=True):
            before, then = (f"{leaf.dtype}{tuple(leaf.shape)}" for leaf in (a, b))
            require(before == then, f"extend changes the state's {jax.tree_util.keystr(path)} from {before} to {then}")


def _bytes(state: State) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def law_11_streams_past_their_length(subject: Subject) -> None:
    """A state that grows with the length it is made for refuses more tokens; one that does not takes any number."""
    module = subject.module
    whole = inputs(LENGTH)
    x, expected = whole[:, :18], subject.call(whole)[:, :18]

    def compiled(state: State, segments: list[list[int]]) -> tuple[jax.Array, State]:
        outs = []
        for start in range(0, len(segments[0]), 3):
            context = Context(segments=jnp.asarray(segments, jnp.int32)[:, start : start + 3])
            out, state = subject.extend(x[:, start : start + 3], state, context)
            outs.append(out)
        return jnp.concatenate(outs, axis=1), state

    sizes = [_bytes(jax.eval_shape(lambda length=length: subject.init_state(2, length))) for length in (9, 256)]
    bounded = sizes[0] < sizes[1]  # a window that holds more than 9 tokens does not slide over 9 either
    ones, padding = [[1] * 18] * 2, [[0] * 3] * 2
    out, past = compiled(subject.init_state(2, 9), ones)
    require_close(out[:, :9], expected[:, :9], FP32, "9 tokens streamed with a state made for 9 differ")
    flag = bool(jax.jit(overfull)(past))
    require(flag == bounded, f"overfull of a state made for 9 tokens and given 18 in jit is {flag}, not {bounded}")
    if not bounded:
        require_close(out, expected, FP32, "18 tokens streamed with a state of a fixed size, made for 9, differ")
        require(bounded_parts(past) == [], "a state of a fixed size has a part that bounds its length")
        check_capacity(past)
        return

    # Inside jit a flag went up. It stays, and the next call outside raises.
    _, past = compiled(past, padding)
    compiled_says = r"a compiled function gave this state 18 tokens; it has room for 9 "
    require_refusal(lambda: module.extend(x[:, :1], past), compiled_says)
    require_refusal(lambda: check_capacity(past), compiled_says)
    # Outside: refused, with capacity, tokens held and tokens added. Padding takes no room; each row has its own.
    require_refusal(
        lambda: module.extend(x[:, :10], subject.init_state(2, 9)), r"room for 9 tokens; it holds 0, and 10 more"
    )
    _, full = compiled(subject.init_state(2, 9), [[1] * 9, [1] * 7 + [0] * 2])
    check_capacity(full)
    three = Context(segments=jnp.asarray([[0] * 3, [1] * 3]))
    require_refusal(lambda: module.extend(x[:, :3], full, three), r"room for 9 tokens; it holds 7, and 3 more")
    _, then = compiled(full, [[0] * 3, [1, 0, 1]])
    require(not bool(overfull(then)), "padding takes room in the state: 9 tokens and padding overfill one made for 9")
    require_refusal(lambda: module.extend(x[:, :1], then), r"room for 9 tokens; it holds 9, and 1 more")


LAWS: dict[str, Callable[[Subject], None]] = {
    function.__name__: function
    for function in (law_2_streaming, law_2_streaming_ragged, law_6_state_size, law_11_streams_past_their_length)
}
"""The laws of this file by name."""
