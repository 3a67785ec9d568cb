"""MQAR: every example has the published structure, gaps and selections follow their laws, streams are pure
functions."""

import functools
import itertools

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError, from_json, to_json
from recollect.data.synthetics import MQAR, RecallSlice
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.mqar import drawn_gaps


def example_batch(task, rows=64, seed=0, step=0):
    part = task.train_slices()[0]
    batch = jax.jit(lambda seed, step: task.train_batch(seed, step, part, rows))(seed, step)
    return part, jax.tree.map(np.asarray, batch)


@pytest.mark.parametrize(
    "task",
    [
        MQAR(vocab_size=256, length=64, pairs=8),
        MQAR(vocab_size=256, length=64, pairs=8, filler="zero"),
        MQAR(vocab_size=66, length=64, pairs=16),  # no gap is left out, half of all keys are used
        MQAR(vocab_size=128, length=48, pairs=5, passes=2, filler="zero"),
        MQAR(vocab_size=8192, length=64, pairs=4, contradictions=True),
        MQAR(vocab_size=256, length=2 * 2 * 1, pairs=1),
    ],
    ids=["random", "zero", "full", "two-passes", "published", "smallest"],
)
def test_structure_of_every_example(task):
    part, batch = example_batch(task)
    half, context = task.vocab_size // 2, 2 * part.pairs * task.passes
    assert batch.tokens.shape == (64, part.length) and batch.tokens.dtype == np.int32
    assert batch.targets.shape == batch.target_positions.shape == batch.weights.shape == (64, part.pairs)
    assert (batch.weights == 1).all() and batch.segments is None
    assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocab_size
    for tokens, targets, positions in zip(batch.tokens, batch.targets, batch.target_positions, strict=True):
        once = tokens[: 2 * part.pairs]
        keys, values = once[0::2], once[1::2]
        assert (tokens[:context] == np.tile(once, task.passes)).all()
        assert len(set(keys)) == len(set(values)) == part.pairs
        assert keys.min() >= 1 and keys.max() < half and values.min() >= half
        assert len(set(positions)) == part.pairs and (positions % 2 == 0).all()
        assert positions.min() >= context and positions.max() <= part.length - 2
        assert (tokens[positions] == keys).all() and (targets == values).all()
        rest = np.delete(tokens[context:], positions - context)
        if task.filler == "zero":
            assert (rest == 0).all()  # so no answer is in the input after its query
        elif not task.contradictions:
            assert not np.isin(rest, keys).any()


def test_published_filler_contradicts_and_the_default_covers_all_other_tokens():
    published = example_batch(MQAR(vocab_size=66, length=64, pairs=4, contradictions=True), rows=256)[1]
    keys = published.tokens[:, 0:8:2]
    extra = (published.tokens[:, 8:, None] == keys[:, None, :]).sum() - keys.size
    # 52 filler places a row, each one of 4 keys with probability 4/66.
    assert abs(extra / (256 * 52 * 4 / 66) - 1) < 0.15

    ours = example_batch(MQAR(vocab_size=66, length=64, pairs=4), rows=2048)[1]
    filler = np.ones(ours.tokens.shape, bool)
    filler[:, :8] = False
    np.put_along_axis(filler, ours.target_positions, False, axis=1)
    counts = np.bincount(ours.tokens[filler], minlength=66)
    # Key ids 1..32 are missing from a row when they are among its 4 keys of 32: share (28/32)/62 each; the others 1/62.
    expected = np.where((np.arange(66) >= 1) & (np.arange(66) <= 32), 28 / 32, 1.0) / 62 * filler.sum()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 120  # 65 degrees of freedom: mean 65, standard deviation 11


def test_gaps_follow_the_power_law_drawn_one_after_the_other():
    space, draws, power, rows = 12, 3, 0.01, 40_000
    gaps = np.asarray(jax.jit(drawn_gaps, static_argnums=(1, 2, 3, 4))(jax.random.key(3), rows, space, draws, power))
    law = power * np.arange(1, space + 1) ** (power - 1)
    law /= law.sum()
    # Exact probability of each ordered triple of successive draws without replacement.
    chi_square, cells = 0.0, 0
    code = (gaps[:, 0] * space + gaps[:, 1]) * space + gaps[:, 2]
    counts = np.bincount(code, minlength=space**3)
    for a, b, c in itertools.product(range(space), repeat=3):
        count = counts[(a * space + b) * space + c]
        if len({a, b, c}) < 3:
            assert count == 0
            continue
        expected = rows * law[a] * law[b] / (1 - law[a]) * law[c] / (1 - law[a] - law[b])
        chi_square += (count - expected) ** 2 / expected
        cells += 1
    assert abs(chi_square - cells) < 5 * np.sqrt(2 * cells)


def test_gaps_agree_with_numpy_choice():
    space, draws, rows = 28, 4, 20_000
    law = np.arange(1, space + 1) ** (0.01 - 1)
    law /= law.sum()
    generator = np.random.default_rng(0)
    theirs = np.stack([generator.choice(space, draws, replace=False, p=law) for _ in range(rows)])
    ours = np.asarray(drawn_gaps(jax.random.key(0), rows, space, draws, 0.01))
    for column in range(draws):
        left = np.bincount(theirs[:, column], minlength=space) / rows
        right = np.bincount(ours[:, column], minlength=space) / rows
        assert np.abs(left - right).max() < 5 * np.sqrt(2 * 0.25 / rows)
    assert abs(theirs[:, 0].mean() - ours[:, 0].mean()) < 0.25 and abs(theirs[:, -1].mean() - ours[:, -1].mean()) < 0.35


@pytest.mark.parametrize("choices", [12, 11], ids=["redrawn", "top-k"])
def test_selections_without_replacement_are_uniform(choices):
    rows, count = 60_000, 3
    drawn = np.asarray(jax.jit(distinct, static_argnums=(1, 2, 3))(jax.random.key(1), rows, choices, count))
    counts = np.bincount((drawn[:, 0] * choices + drawn[:, 1]) * choices + drawn[:, 2], minlength=choices**3)
    cells = choices * (choices - 1) * (choices - 2)
    observed = np.array(
        [counts[(a * choices + b) * choices + c] for a, b, c in itertools.permutations(range(choices), 3)]
    )
    assert observed.sum() == rows  # nothing outside the ordered selections
    chi_square = ((observed - rows / cells) ** 2 / (rows / cells)).sum()
    assert abs(chi_square - (cells - 1)) < 5 * np.sqrt(2 * cells)


def test_streams_are_pure_functions_of_seed_and_number():
    task = MQAR(vocab_size=256, length=64, pairs=8)
    first = example_batch(task, seed=1, step=5)[1]
    train = jax.jit(lambda seed, step: task.train_batch(seed, step))  # the defaults are the first slice and 64 rows
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(train(1, 5)), strict=True):
        assert (left == right).all()
    first_keys = jax.jit(lambda: task.evaluation_batch(1, 5).tokens[:, 0])
    for other in (train(1, 6).tokens[:, 0], train(2, 5).tokens[:, 0], first_keys()):
        # Two independent batches share a first key in one of 127 rows.
        assert (first.tokens[:, 0] == other).mean() < 0.15


def test_evaluation_slices_are_independent():
    parts = (RecallSlice(length=64, pairs=8), RecallSlice(length=128, pairs=8), RecallSlice(length=64, pairs=4))
    task = MQAR(vocab_size=256, evaluation=parts)
    wide, long, narrow = jax.jit(lambda: [task.evaluation_batch(0, 0, part).tokens[:, 0] for part in parts])()
    assert (wide == long).mean() < 0.15 and (wide == narrow).mean() < 0.15


def test_populations_draw_what_lone_runs_draw():
    task = MQAR(vocab_size=256, length=64, pairs=8)
    seeds = jnp.arange(5, dtype=jnp.uint32)
    draw = functools.partial(task.train_batch, slice=task.train_slices()[0], batch_size=16)
    together = jax.jit(jax.vmap(lambda seed: draw(seed, 3)))(seeds)
    for index, seed in enumerate(seeds):
        alone = jax.jit(draw)(seed, 3)
        for left, right in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert (left[index] == right).all()


def test_calls_take_slices_by_weight():
    mixture = (RecallSlice(length=64, pairs=4, weight=3.0), RecallSlice(length=128, pairs=8, weight=1.0))
    task = MQAR(mixture=mixture)
    drawn = [task.slice_for(0, call).name for call in range(2000)]
    assert drawn == [task.slice_for(0, call).name for call in range(2000)]
    assert drawn != [task.slice_for(1, call).name for call in range(2000)]
    assert abs(drawn.count("64x4") / 2000 - 0.75) < 0.05
    equally = tuple(chz.replace(part, weight=1.0) for part in mixture)
    assert task.longest == 128 and task.evaluation_slices() == equally
    assert from_json(to_json(task)) == task


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 63}, "length=63: must be even"),
        ({"vocab_size": 64, "length": 64}, "vocab_size=64: must be larger than the length, 64"),
        ({"vocab_size": 8192, "length": 64, "pairs": 17}, "at most 16 pairs fit"),
        ({"vocab_size": 8192, "length": 64, "pairs": 11, "passes": 2}, "at most 10 pairs fit"),
        ({"pairs": 0}, "pairs=0"),
        ({"power": 0.0}, "power=0.0"),
        ({"passes": 0}, "passes=0"),
        ({"evaluation": (RecallSlice(length=64, pairs=33),)}, "at most 16 pairs fit"),
        (
            {"mixture": (RecallSlice(length=64, pairs=4), RecallSlice(length=64, pairs=4, weight=2.0))},
            "slice 64x4 twice",
        ),
        ({"evaluation_examples": 0}, "evaluation_examples=0"),
    ],
)
def test_impossible_tasks_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        MQAR(**fields)


def test_published_settings_are_accepted():
    for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64), (64, 16), (256, 64), (1024, 256)):
        assert MQAR(length=length, pairs=pairs).longest == length
    with pytest.raises(UserError, match="weight=0: each slice of mixture"):
        MQAR(mixture=(RecallSlice(length=64, pairs=4, weight=0.0),))
