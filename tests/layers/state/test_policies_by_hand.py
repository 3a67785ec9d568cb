"""Cache policies that drop something do what their definitions say: each beside a loop over tokens and heads."""

import itertools

import chz
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers.mixers.attention import Attention
from recollect.layers.state import (
    HeavyHitters,
    HiP,
    LongHeads,
    Quantised,
    Recycled,
    SnapKV,
    StreamingLLM,
    TaskKV,
)
from tests.layers.state.policy_streams import LENGTH, PROMPT, ROTARY, WIDTH, X, module_of, streamed


def by_hand(read):
    """Outputs of `ROTARY` on the second row, one token and key head after another. read(i, g, k, v), of keys that are
    not rotated, returns the keys that are read, their values, their positions, the query's, and what is given the
    probability of each."""
    module, x = module_of(ROTARY), X[1:]
    q = np.asarray(module.query(x)).reshape(LENGTH, 2, 2, -1)
    k, v = (np.asarray(part(x)).reshape(LENGTH, 2, -1) for part in (module.key, module.value))
    heads = np.zeros((LENGTH, 2, 2, q.shape[-1]), np.float32)
    for i, g in itertools.product(range(LENGTH), range(2)):
        keys, values, at, own, observe = read(i, g, k[:, g], v[:, g])
        scores = rotated(q[i, g], [own] * 2) @ rotated(keys, at).T / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        heads[i, g] = weights @ values
        observe(weights.sum(0))
    return np.asarray(module.output(jnp.asarray(heads).reshape(1, LENGTH, -1)))[0]


def mass_by_hand(tokens):
    """The share of full attention's probability that tokens[i, g] hold, of each token of the second row."""
    shares = [[probabilities(i, g)[:, sorted(tokens[i, g])].sum(1) for g in range(2)] for i in range(LENGTH)]
    return np.mean(shares, axis=(1, 2))


def probabilities(i, g):
    """Full attention of both query heads of key head g at token i of the second row, to all tokens up to it."""
    module, x = module_of(ROTARY), X[1:]
    q, k = (np.asarray(part(x)).reshape(LENGTH, 2, -1, WIDTH // 4) for part in (module.query, module.key))
    scores = rotated(q[i, g], [i, i]) @ rotated(k[: i + 1, g, 0], range(i + 1)).T / np.sqrt(WIDTH // 4)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def rotated(x, positions):
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.asarray(positions)[:, None] * 10_000.0 ** (-np.arange(half) / half))
    turned = (x[:, :half] + 1j * x[:, half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=1)


def nothing(weights):
    pass


def test_heavy_hitters_are_those_of_the_paper():
    budget, recent = 6, 3
    lists, mass = [[], []], np.zeros((2, LENGTH))

    def read(i, g, k, v):
        kept = lists[g]
        if len(kept) == budget:
            kept.remove(min((j for j in kept if i - j >= recent), key=lambda j: mass[g, j]))
        kept.append(i)

        def observe(weights):
            mass[g, kept] += weights

        return k[kept], v[kept], kept, i, observe

    policy = HeavyHitters(budget=budget, recent=recent)
    out, state, _ = streamed(chz.replace(ROTARY, cache=policy), prompt=0)
    np.testing.assert_allclose(out[1], by_hand(read), atol=2e-5)
    for g in range(2):
        assert sorted(np.asarray(state.cache.positions)[1, g]) == lists[g]
    assert lists[0] != lists[1]  # heads differ
    # Of a prompt, all of whose keys are read, the same number stay.
    out, state, _ = streamed(chz.replace(ROTARY, cache=policy), prompt=LENGTH - 1)
    np.testing.assert_allclose(out[:, :-1], module_of(ROTARY)(X).hidden[:, :-1], atol=2e-5)


def test_streaming_llm_counts_positions_in_the_cache():
    def read(i, g, k, v):
        kept = [*range(min(i + 1, 2)), *range(max(2, i - 3), i + 1)]
        return k[kept], v[kept], list(range(len(kept))), len(kept) - 1, nothing

    for prompt in (0, 11):
        out, _, _ = streamed(chz.replace(ROTARY, cache=StreamingLLM(budget=6, sinks=2)), prompt=prompt)
        np.testing.assert_allclose(out[1], by_hand(read), atol=2e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_keys_have_steps_per_channel_and_values_per_token(bits):
    def coded(x, axis):
        low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
        step = (high - low) / (2**bits - 1)
        return np.round((x - low) / step) * step + low

    def read(i, g, k, v):
        done = i // 4 * 4
        k = rotated(k, range(LENGTH))
        keys = np.concatenate([*(coded(k[at : at + 4], 0) for at in range(0, done, 4)), k[done : i + 1]])
        return keys, np.concatenate([coded(v[:done], 1), v[done : i + 1]]), [0] * (i + 1), i, nothing

    out, state, _ = streamed(chz.replace(ROTARY, cache=Quantised(bits=bits, window=4)), prompt=0)
    np.testing.assert_allclose(out[1], by_hand(read), atol=2e-4)
    assert state.cache.keys.code.dtype == jnp.uint8 and state.cache.keys.code.shape[-1] == WIDTH // 4 * bits // 8
    exact = module_of(ROTARY)(X).hidden
    assert np.abs(out - exact).max() > 1e-5
    prefilled, _, _ = streamed(chz.replace(ROTARY, cache=Quantised(bits=bits, window=4)), prompt=LENGTH - 1)
    np.testing.assert_allclose(prefilled[:, :-1], exact[:, :-1], atol=2e-5)


def test_recycled_reads_what_mattered_at_the_last_full_step():
    top, every, kept, chosen = 4, 5, {}, {}

    def read(i, g, k, v):
        full = i % every == 0
        if not full:
            least = min(range(len(kept[g])), key=lambda at: kept[g][at][0])
            kept[g] = [one for at, one in enumerate(kept[g]) if at != least or len(kept[g]) < top] + [(0, i)]
        chosen[i, g] = tokens = list(range(i + 1)) if full else [j for _, j in kept[g]]

        def observe(weights):
            kept[g] = sorted(zip(weights, tokens, strict=True), key=lambda one: -one[0])[: top if full else None]

        return k[tokens], v[tokens], tokens, i, observe

    config = chz.replace(ROTARY, cache=Recycled(top=top, every=every))
    expected = by_hand(read)
    out, _, read = streamed(config, prompt=0)
    np.testing.assert_allclose(out[1], expected, atol=2e-5)
    assert read.keys[:, 1].tolist() == [i + 1 if i % every == 0 else min(top, i + 1) for i in range(LENGTH)]
    np.testing.assert_allclose(read.mass[:, 1], mass_by_hand(chosen), atol=2e-5)
    # Queries that never turn away need no second full step, and with a prompt the first one is its last token.
    still = chz.replace(ROTARY, cache=Recycled(top=top, every=2, similarity=-1.0))
    _, _, read = streamed(still, prompt=0)
    assert read.keys[:, 1].tolist() == [1, 2, 3, *[top] * (LENGTH - 3)]
    _, _, read = streamed(config)
    assert read.keys[:, 1].tolist() == [PROMPT + 1 + i if i % 5 == 4 else top for i in range(LENGTH - PROMPT)]


def test_snap_kv_keeps_what_the_end_of_the_prompt_looks_at():
    budget, window, prompt = 5, 2, 12
    config = chz.replace(ROTARY, cache=SnapKV(budget=budget, window=window, kernel=3, recent=3))
    out, state, reads = streamed(config, prompt=prompt)
    np.testing.assert_allclose(out[:, :prompt], module_of(ROTARY)(X).hidden[:, :prompt], atol=2e-5)
    mass = np.zeros((2, LENGTH))

    def read(i, g, k, v):
        tokens = list(range(i + 1))

        def observe(weights):
            if prompt - window <= i < prompt:
                mass[g, : i + 1] += weights

        return k[tokens], v[tokens], tokens, i, observe

    by_hand(read)
    for g in range(2):
        pooled = [mass[g, max(0, j - 1) : min(prompt, j + 2)].max() for j in range(prompt - window)]
        kept = sorted([*np.argsort(pooled)[-(budget - window) :], *range(prompt - window, prompt)])
        assert sorted(np.asarray(state.cache.prompt.positions)[1, g]) == kept
    assert sorted(np.asarray(state.cache.recent.positions)[1, 0]) == [LENGTH - 3, LENGTH - 2, LENGTH - 1]
    assert reads.keys[:, 1].tolist() == [budget + min(3, i + 1) for i in range(LENGTH - prompt)]
    assert reads.mass is None  # what was dropped cannot be compared


def test_task_kv_keeps_everything_for_the_head_that_is_far_from_the_mean():
    budget, sinks, recent, window, prompt = 7, 1, 2, 3, 12
    policy = TaskKV(share=0.5, budget=budget, sinks=sinks, recent=recent, window=window)
    out, state, reads = streamed(chz.replace(ROTARY, cache=policy), prompt=prompt)
    last, v = range(prompt - window, prompt), np.asarray(module_of(ROTARY).value(X[1])).reshape(LENGTH, 2, -1)
    means = np.array([np.mean([probabilities(i, g) @ v[: i + 1, g] for i in last], axis=0) for g in range(2)])
    unit = means / np.linalg.norm(means, axis=-1, keepdims=True)
    full = int(np.linalg.norm(unit - unit.mean((0, 1)), axis=-1).max(1).argmax())
    mass = np.zeros(LENGTH)
    for i in last:
        mass[: i + 1] += probabilities(i, 1 - full).sum(0)
    middle = sorted(range(sinks, prompt - recent), key=lambda j: mass[j])[-(budget - sinks - recent) :]
    kept = [*range(sinks), *middle, *range(prompt - recent, prompt)]

    def read(i, g, k, v):
        tokens = list(range(i + 1))
        if i >= prompt and g != full:
            kept.remove(min((j for j in kept if j >= sinks and i - j >= recent), key=lambda j: mass[j]))
            kept.append(i)
            tokens = sorted(kept)
        return k[tokens], v[tokens], tokens, i, nothing

    np.testing.assert_allclose(out[1], by_hand(read), atol=2e-5)
    assert state.cache.order[1].tolist() == [full, 1 - full]
    assert reads.keys[:, 1].tolist() == [(i + 1 + budget) / 2 for i in range(prompt, LENGTH)]
    assert state.cache.full.keys.shape == (2, 1, LENGTH, WIDTH // 4)
    with pytest.raises(UserError, match="divides the key heads"):
        module_of(Attention(cache=policy)).init_state(1, 4)


def test_long_heads_read_chunks_at_positions_one_after_another():
    size, top, keys, chosen = 3, 4, {}, {}

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def chunk_key(c, g, k, v):
        module, here = module_of(ROTARY), slice(c * size, c * size + size)
        q = np.asarray(module.query(X[1:])).reshape(LENGTH, 2, 2, -1)[here, g]
        k, v, scale = rotated(k[here], range(size)), v[here], k.shape[-1] ** -0.5
        mean = [(softmax(rotated(q[:, r], range(size)) @ k.T * scale) @ v).mean(0) for r in range(2)]
        return np.mean([softmax(k @ m * scale) @ k for m in mean], axis=0)

    def read(i, g, k, v):
        q = np.asarray(module_of(ROTARY).query(X[1:])).reshape(LENGTH, 2, 2, -1)[i, g]
        now = i // size
        if i % size == 0 and now:
            keys[g, now - 1] = chunk_key(now - 1, g, k, v)
        always = {c for c in (0, now - 1, now) if c >= 0}
        fitting = sorted(set(range(now)) - always, key=lambda c: -(q @ keys[g, c]).max())
        chunks = sorted([*always, *fitting[: top - len(always)]])
        chosen[i, g] = tokens = [j for c in chunks for j in range(c * size, c * size + size) if j <= i]
        return k[tokens], v[tokens], list(range(len(tokens))), len(tokens) - 1, nothing

    config = chz.replace(ROTARY, cache=LongHeads(chunk=size, top=top))
    expected = by_hand(read)
    for prompt in (0, PROMPT):
        out, _, reads = streamed(config, prompt=prompt)
        np.testing.assert_allclose(out[1], expected, atol=2e-5)
        np.testing.assert_allclose(reads.mass[:, 1], mass_by_hand(chosen)[prompt:], atol=2e-5)
    assert reads.keys[-1, 1] == 3 * size + 2 + 6  # three whole chunks, two tokens of the last, six chunk keys


@pytest.mark.parametrize("every", [1, 3])
def test_hip_reads_what_its_search_finds(every):
    block, beams, sinks, window, found, chosen = 2, 2, 1, 3, {}, {}

    def search(q, k, blocks):
        ends = [i * blocks // beams for i in range(beams + 1)]
        nodes = [(a, b) for a, b in itertools.pairwise(ends) if b > a]
        while any(b - a > 1 for a, b in nodes):
            middles = [(a + (b - a + 1) // 2, a, b) for a, b in nodes]
            halves = [half for m, a, b in middles for half in ((a, m), (m, b)) if half[1] > half[0]]

            def score(half):
                at = (half[0] + (half[1] - half[0]) // 2) * block
                return (q @ k[at : at + block].T).max()

            nodes = sorted(halves, key=score)[-beams:]
        return [a for a, _ in nodes]

    def read(i, g, k, v):
        if i % every == 0:
            border = max(i + 1 - window, 0) // block
            q = np.asarray(module_of(ROTARY).query(X[1:])).reshape(LENGTH, 2, 2, -1)[i, g]
            found[g] = search(rotated(q, [i, i]), rotated(k, range(LENGTH)), border), border * block
        blocks, start = found[g]
        tokens = {j for a in blocks for j in range(a * block, a * block + block)} | set(range(min(sinks, start)))
        chosen[i, g] = tokens = sorted(tokens | set(range(start, i + 1)))
        return k[tokens], v[tokens], tokens, i, nothing

    policy = HiP(block=block, top=beams * block, sinks=sinks, window=window, every=every)
    out, _, reads = streamed(chz.replace(ROTARY, cache=policy), prompt=0)
    np.testing.assert_allclose(out[1], by_hand(read), atol=2e-5)
    np.testing.assert_allclose(reads.mass[:, 1], mass_by_hand(chosen), atol=2e-5)
    assert reads.keys[-1, 1] <= policy.keys_read(LENGTH) * every
