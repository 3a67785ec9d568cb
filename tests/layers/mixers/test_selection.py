"""Mixers that select by content, against loops over queries and keys written from their papers' equations, in float64:
MoBA, NSA, DSA's indexer, Zoology's input-dependent attention. What those that stream report to have read, too."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.layers.mixer import Context
from recollect.layers.modules import LightningIndexer, MeanBlocks, Rotary
from recollect.layers.state import measured_reads
from recollect.models import LanguageModel, flatten, repeat
from tests.layers.mixers.test_softmax_family import (
    T,
    X,
    assert_equal,
    attended,
    built,
    heads,
    linear,
    rms,
    softmax,
    turned,
    w,
)


def assert_reads(module, q, k, chosen, others):
    """Of each token that is streamed: the number of keys, those in chosen[i, h] for some query head h of a key head and
    others(i) more; and the share of softmax(q k / sqrt(dim)) over all keys that chosen ones hold."""

    def step(state, x):
        with measured_reads() as layers:
            _, state = module.extend(x[:, None], state)
        return state, layers[0]

    (h, dim), g = q.shape[1:], k.shape[1]
    run = jax.jit(lambda x: jax.lax.scan(step, module.init_state(1, T), jnp.swapaxes(x, 0, 1))[1])
    reads = run(jnp.asarray(X, jnp.float32))
    for i in range(T):
        by_key_head = [set().union(*(chosen[i, head] for head in range(h) if head * g // h == at)) for at in range(g)]
        assert reads.keys[i, 0] == np.mean([len(keys) for keys in by_key_head]) + others(i)
        shares = [
            softmax(q[i, head] @ k[: i + 1, head * g // h].T / math.sqrt(dim))[sorted(chosen[i, head])].sum()
            for head in range(h)
        ]
        np.testing.assert_allclose(reads.mass[i, 0], np.mean(shares), rtol=1e-5)


@pytest.mark.parametrize("top", [1, 2, 3])
def test_block_selection_is_moba(top):
    selector = MeanBlocks(block=2, top=top)
    module = built(layers.BlockSelection(heads=4, key_heads=2, retrieve=selector))
    x = X[0]
    q, k, v = heads(module.query, x, 4), heads(module.key, x, 2), heads(module.value, x, 2)
    o, chosen = [], {}
    for h in range(4):
        g, out = h // 2, np.zeros((T, 4))
        for i in range(T):
            past = range(i // 2)
            fit = {n: q[i, h] @ (k[2 * n, g] + k[2 * n + 1, g]) / 2 for n in past}
            picked = {i // 2, *sorted(past, key=fit.get)[len(past) - min(top - 1, len(past)) :]}
            chosen[i, h] = seen = [j for j in range(i + 1) if j // 2 in picked]
            out[i] = softmax(np.array([q[i, h] @ k[j, g] / 2 for j in seen])) @ v[seen, g]
        o.append(out)
    assert_equal(module, linear(module.output, np.concatenate(o, axis=-1)))
    if top == 2:  # beside them the means of the blocks before
        assert_reads(module, q, k, chosen, lambda i: i // 2)


def test_block_selection_with_all_blocks_is_attention():
    config = layers.BlockSelection(heads=2, retrieve=MeanBlocks(block=2, top=9))
    module, plain = built(config), built(layers.Attention(heads=2))
    np.testing.assert_allclose(module(jnp.asarray(X, jnp.float32)).hidden, plain(jnp.asarray(X, jnp.float32)).hidden)


@pytest.mark.parametrize("top", [1, 3])
def test_block_selection_by_an_indexer(top):
    """Each query attends to the tokens of the largest index score, and the indexer's loss is their divergence."""
    indexer = LightningIndexer(
        heads=2, dim=3, top=top, positions=Rotary(fraction=0.7, layout="interleaved"), weight=0.3
    )
    module, x = built(layers.BlockSelection(heads=4, key_heads=2, retrieve=indexer)), X[0]
    q, k, v = heads(module.query, x, 4), heads(module.key, x, 2), heads(module.value, x, 2)
    o, divergence = np.zeros((T, 4, 4)), []
    for i in range(T):
        scores = index_scores(module.selector, x, i, 2, 3)
        read = sorted(np.argsort(-scores, kind="stable")[:top])
        weights = np.stack([softmax(q[i, h] @ k[read, h // 2].T / 2) for h in range(4)])
        o[i] = [weights[h] @ v[read, h // 2] for h in range(4)]
        p, index = weights.mean(0), softmax(scores[read])
        divergence.append(np.sum(p * np.log(p / index)))
    assert_equal(module, linear(module.output, o.reshape(T, 16)))
    loss = module(jnp.asarray(X, jnp.float32)).losses["selector"]
    np.testing.assert_allclose(loss, 0.3 * np.mean(divergence), rtol=1e-4, atol=1e-7)


def index_scores(indexer, x, i, n, dim):
    q, k = linear(indexer.query, x[i]).reshape(n, dim), linear(indexer.key, x[: i + 1])
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-5)
    k = k * w(indexer.norm.gain) + w(indexer.norm.bias)
    if indexer.positions is not None:
        q, k = q.copy(), k.copy()
        q[:, :2] = [turned(y, i) for y in q[:, :2]]
        k[:, :2] = [turned(y, j) for j, y in enumerate(k[:, :2])]
    return np.sum(linear(indexer.head_weights, x[i])[:, None] * np.maximum(q @ k.T, 0), axis=0) / math.sqrt(n * dim)


@pytest.mark.parametrize("dense", [False, True])
def test_sparse_latent_attention(dense):
    """DSA: latent attention whose heads all read the indexer's tokens; dense, plain latent attention."""
    indexer = LightningIndexer(heads=2, dim=4, top=3, dense=dense)
    module = built(
        layers.SparseLatentAttention(heads=2, rank=7, key_dim=5, value_dim=3, rotary_dim=0, retrieve=indexer)
    )
    x = X[0]
    latent = rms(linear(module.down, x), w(module.norm.gain))
    q, k, v = heads(module.query, x, 2), heads(module.key_up, latent, 2), heads(module.value_up, latent, 2)
    o, chosen = np.zeros((T, 2, 3)), {}
    for i in range(T):
        read = np.argsort(-index_scores(module.selector, x, i, 2, 4), kind="stable")[: T if dense else 3]
        chosen[i, 0] = chosen[i, 1] = read
        o[i] = [softmax(q[i, h] @ k[read, h].T / math.sqrt(5)) @ v[read, h] for h in range(2)]
    assert_equal(module, linear(module.output, o.reshape(T, 6)))
    if not dense:  # heads share a latent; beside those picked the index keys of all
        assert_reads(module, q, k, chosen, lambda i: i + 1)


def test_the_indexer_is_trained_by_its_loss_alone():
    module = built(layers.SparseLatentAttention(heads=2, rank=7, retrieve=LightningIndexer(top=3)))
    graph, weights = nnx.split(module)

    def gradients(value):
        loss = lambda weights: value(nnx.merge(graph, weights)(jnp.asarray(X, jnp.float32)))  # noqa: E731
        return {path: bool(np.any(leaf)) for path, leaf in flatten(nnx.to_pure_dict(jax.grad(loss)(weights))).items()}

    of_loss, of_output = gradients(lambda out: out.losses["selector"]), gradients(lambda out: jnp.sum(out.hidden**2))
    assert {path for path, moved in of_loss.items() if moved} == {path for path in of_loss if "selector" in path}
    assert not any(moved for path, moved in of_output.items() if "selector" in path)


@pytest.mark.parametrize(("compress", "size", "top", "local"), [("mlp", 4, 3, 1), ("mean", 2, 4, 2), ("mean", 4, 2, 1)])
def test_native_sparse_attention(compress, size, top, local):
    config = layers.NativeSparseAttention(
        heads=4, key_heads=2, block=4, stride=2, size=size, top=top, local=local, window=3, compress=compress
    )
    module, x = built(config), X[0]
    q = heads(module.query, x, 4)
    k, v = (heads(part, x, 6).reshape(T, 3, 2, 4) for part in (module.key, module.value))
    gates = 1 / (1 + np.exp(-linear(module.gate, x).reshape(T, 3, 4)))

    def compressed(phi, block):
        if phi is None:
            return block.mean(0)
        hidden = linear(phi.up, (block + w(phi.places)).reshape(-1))
        return linear(phi.down, np.asarray(jax.nn.gelu(hidden), np.float64))

    o, chosen, others = np.zeros((T, 4, 4)), {}, []
    for i in range(T):
        past = [n for n in range(T) if 2 * n + 3 <= i]
        importance = np.zeros((2, T))
        for h in range(4):
            g = h // 2
            if past:
                keys, values = (
                    np.stack([compressed(phi, y[2 * n : 2 * n + 4, 0, g]) for n in past])
                    for y, phi in ((k, module.compress_key), (v, module.compress_value))
                )
                p = softmax(keys @ q[i, h] / 2)
                o[i, h] += gates[i, 0, h] * (p @ values)
                for n, share in zip(past, p, strict=True):
                    for piece in (2 * n, 2 * n + 2):  # the strides of the compressed block
                        importance[g, piece // size] += share
            near = np.arange(max(0, i - 2), i + 1)
            o[i, h] += gates[i, 2, h] * (softmax(k[near, 2, g] @ q[i, h] / 2) @ v[near, 2, g])
        for h in range(4):
            g, own = h // 2, i // size
            always = {own, *range(max(0, own - local + 1), own), 0}
            rest = sorted(set(range(own)) - always, key=lambda n, g=g: (-importance[g, n], n))
            blocks = always | set(rest[: max(0, top - len(always))])
            chosen[i, h] = read = [j for j in range(i + 1) if j // size in blocks]
            o[i, h] += gates[i, 1, h] * (softmax(k[read, 1, g] @ q[i, h] / 2) @ v[read, 1, g])
        others.append(len(past) + len(near))
    assert_equal(module, linear(module.output, o.reshape(T, 16)))
    if local == 2:
        assert_reads(module, q, k[:, 1], chosen, others.__getitem__)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_selective_attention_that_learns(threshold):
    module, x = built(layers.SelectiveAttention(heads=2, threshold=threshold, share=0.1, weight=0.5)), X[0]
    q, k, v = (heads(part, x, 2) for part in (module.query, module.key, module.value))
    o = [attended(lambda i, j, h=h: q[i, h] @ k[j, h] / math.sqrt(8), v[:, h]) for h in range(2)]
    s = 1 / (1 + np.exp(-linear(module.selector, x)))
    kept = s if threshold is None else s * (s > threshold)
    assert 0 < np.sum(s > 0.5) < T
    assert_equal(module, kept * linear(module.output, np.concatenate(o, axis=-1)) + x)
    out = module(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(out.losses["sparsity"], 0.5 * (s.mean() - 0.1), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["selected_tokens"], s.mean(), rtol=1e-5)


def test_selective_attention_at_repeated_tokens():
    module, plain = built(layers.SelectiveAttention(select="repeats")), built(layers.Attention())
    x, ids = jnp.asarray(X, jnp.float32), jnp.array([[3, 5, 3, 0, 5, 7, 8, 8, 3, 1, 0]])
    repeats = np.array([0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1])
    expected = np.asarray(plain(x).hidden) * repeats[:, None] + X
    np.testing.assert_allclose(module(x, Context(token_ids=ids)).hidden, expected, rtol=1e-5, atol=1e-5)
    state, outs = module.init_state(1, T), []
    for i in range(0, T, 4):
        out, state = module.extend(x[:, i : i + 4], state, Context(token_ids=ids[:, i : i + 4]))
        outs.append(out.hidden)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, rtol=1e-5, atol=1e-5)
    # Another document has other tokens; and a model tells its mixers their ids.
    segments = jnp.array([[1] * 4 + [2] * 7])
    apart = module(x, Context(segments=segments, token_ids=ids)).metrics["selected_tokens"]
    np.testing.assert_allclose(apart, 2 / T, rtol=1e-6)
    model = LanguageModel(width=16, stages=repeat(layers.SelectiveAttention(select="repeats"), depth=1))
    out = model.build(9, nnx.Rngs(0)).hidden(ids)
    np.testing.assert_allclose(out.metrics["selected_tokens"], repeats.mean(), rtol=1e-6)
