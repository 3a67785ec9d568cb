"""Masks and positions of multimodal designs against loops over pairs of tokens, and what each makes outputs
independent of."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.data.synthetics import GridQuestions
from recollect.layers import (
    Attention,
    Context,
    InjectedAttention,
    Place,
    PlannedAttention,
    PositionInvariantAttention,
    SoftmaxConfig,
)
from recollect.layers.modules import position_plans
from recollect.layers.modules.percept_masks import Bidirectional, Composite, Concentric, ModalityMutual, Parallel
from recollect.layers.modules.positions import Rotary
from recollect.pallas_kernels.scheduled_attention.block_schedule import EMPTY, FULL, block_schedule, pairs_allowed

WIDTH, SIDE, GRIDS = 8, 3, 3
TASK = GridQuestions(side=SIDE, grids=GRIDS, objects=2, kinds=("colour",), questions=3, filler=2)
LENGTH = TASK.slice().length
ROTARY = {"heads": 2, "positions": Rotary(base=100.0)}
DESIGNS: dict[str, SoftmaxConfig] = {
    "croc": Attention(design=Bidirectional(), **ROTARY),
    "aki": Attention(design=ModalityMutual(), **ROTARY),
    "ee_mllm": Attention(design=Composite(), **ROTARY),
    "cca": PlannedAttention(plan="concentric", design=Concentric(), **ROTARY),
    "parallel": PlannedAttention(plan="parallel", design=Parallel(), **ROTARY),
    "saisa": InjectedAttention(inputs=5, **ROTARY),
    "pine": PositionInvariantAttention(segments=GRIDS, **ROTARY),
}


@functools.cache
def context(order: str = "grids_first") -> Context:
    task = GridQuestions(side=SIDE, grids=GRIDS, objects=2, kinds=("colour",), questions=3, filler=2, order=order)
    batch = jax.jit(lambda: task.train_batch(0, 0, batch_size=1))()
    return Context(token_types=batch.token_types, fields=batch.fields)


def tokens_of(order: str) -> list[dict[str, int]]:
    known = jax.device_get(context(order))
    named = {**known.fields, "type": known.token_types}
    return [
        {name: int(field[0, place]) for name, field in named.items()} for place in range(known.token_types.shape[1])
    ]


def fields_of(design: str, known: Context) -> dict[str, np.ndarray]:
    """What the design's mask may read, positions as the mixer has them."""
    t = known.token_types.shape[1]
    fields = position_plans.fields_of(known, 1, t)
    plan = getattr(DESIGNS[design], "plan", None)
    positions = jnp.arange(t)[None] if plan is None else getattr(position_plans, plan)(fields)
    fields |= {"positions": positions, "token_types": known.token_types}
    return {name: np.asarray(field, np.int32) for name, field in fields.items()}


def sees(design: str, tokens: list[dict[str, int]], i: int, j: int) -> bool:
    """Whether token i sees token j, as each design's paper has it."""
    reader, key = tokens[i], tokens[j]
    if reader["type"] != 2 or key["type"] != 2:
        if design == "saisa" and reader["type"] == 2:
            return False
        return j <= i or (design == "aki" and reader["type"] == 2 and key["question"] == 1)
    same = reader["grid"] == key["grid"]
    return {
        "croc": same or j <= i,
        "aki": j <= i,
        "ee_mllm": i == j,
        "cca": same and key["ring"] <= reader["ring"],
        "parallel": same and j <= i,
        "saisa": False,
        "pine": not same or j <= i,
    }[design]


@pytest.mark.parametrize("order", ["grids_first", "questions_first"])
@pytest.mark.parametrize("design", DESIGNS)
def test_masks_are_those_of_the_papers_and_schedules_never_wrong(design, order):
    tokens, config = tokens_of(order), DESIGNS[design]
    t = len(tokens)
    expected = np.array([[sees(design, tokens, i, j) for j in range(t)] for i in range(t)])
    fields = fields_of(design, context(order))
    read = {name: fields[name] for name in config.mask().fields}
    np.testing.assert_array_equal(pairs_allowed(config.mask(), read, read)[0], expected)
    for tile in (2, 5):
        n = t // tile * tile
        cut = {name: field[:, :n] for name, field in read.items()}
        kinds = np.asarray(block_schedule(config.mask(), cut, cut, (n, n), (tile, tile)).kinds)[0]
        pairs = expected[:n, :n].reshape(n // tile, tile, n // tile, tile).swapaxes(1, 2)
        assert not pairs[kinds == EMPTY].any() and pairs[kinds == FULL].all()
        assert (kinds == EMPTY).any()


def test_positions_of_rings_and_of_parallel_grids():
    tokens = tokens_of("grids_first")
    concentric, parallel, rings, place = [], [], (SIDE + 1) // 2, 0
    for index, token in enumerate(tokens):
        if token["grid"]:
            concentric.append((token["grid"] - 1) * rings + token["ring"])
            parallel.append(index % SIDE**2)
        else:
            concentric.append(GRIDS * rings + place)
            parallel.append(SIDE**2 + place)
            place += 1
    for design, expected in (("cca", concentric), ("parallel", parallel)):
        positions = fields_of(design, context())["positions"]
        np.testing.assert_array_equal(positions[0], expected)


def test_documents_in_a_row_have_the_positions_that_they_have_alone():
    alone = context()
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :3], x], axis=1), alone)
    segments = jnp.repeat(jnp.asarray([4, 0, 9]), jnp.asarray([LENGTH, 3, LENGTH]), total_repeat_length=2 * LENGTH + 3)
    packed = Context(token_types=twice.token_types, fields=twice.fields, segments=segments[None])
    for design in ("cca", "parallel"):
        expected = fields_of(design, alone)["positions"][0]
        positions = fields_of(design, packed)["positions"][0]
        for first in (0, LENGTH + 3):
            np.testing.assert_array_equal(positions[first : first + LENGTH], expected)


@functools.cache
def mixer(design: str):
    graph, state = nnx.split(DESIGNS[design].build(WIDTH, Place(0, 2), nnx.Rngs(params=jax.random.key(1))))
    weights = jax.tree.map(lambda leaf: leaf + 0.4 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state)
    call = jax.jit(lambda weights, x, context: nnx.merge(graph, weights)(x, context).hidden)
    return lambda x, context: np.asarray(call(weights, x, context))


def inputs(t: int = LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (1, t, WIDTH))


@pytest.mark.parametrize("design", ["pine", "parallel", "ee_mllm"])
def test_the_order_of_grids_changes_nothing_where_it_must_not(design):
    """To 1e-5: of the cells' outputs, moved along, and of the text's; ee_mllm has no such claim."""
    x, cells = inputs(), GRIDS * SIDE**2
    order = np.concatenate([np.arange(SIDE**2) + SIDE**2 * grid for grid in (2, 0, 1)])
    base = mixer(design)(x, context())
    moved = mixer(design)(x.at[:, :cells].set(x[:, order]), context())
    expected = np.concatenate([base[:, order], base[:, cells:]], axis=1)
    error = np.abs(moved - expected).max() / np.abs(base).max()
    assert error < 1e-5 if design != "ee_mllm" else error > 1e-2


def test_pine_lays_segments_out_by_importance():
    """Against loops: the scores of one head and reader, from positions written out."""
    x, known = inputs(), context()
    config = DESIGNS["pine"]
    module = config.build(WIDTH, Place(0, 2), nnx.Rngs(params=jax.random.key(1)))
    module.query.kernel[...] *= 40.0
    module.key.kernel[...] *= 40.0
    out = np.asarray(module(x, known).hidden)[0]
    q, k, v = (
        np.asarray(part(x), np.float64).reshape(LENGTH, 2, 4) for part in (module.query, module.key, module.value)
    )
    grid, cells = np.asarray(known.fields["grid"])[0], GRIDS * SIDE**2
    rates = 100.0 ** (-np.arange(0, 4, 2) / 4)

    def rotated(vector, position):
        turned = (vector[:2] + 1j * vector[2:]) * np.exp(1j * position * rates)
        return np.concatenate([turned.real, turned.imag])

    def shares(scores):
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    expected = np.zeros((LENGTH, 8))
    shifts = set()
    for head, i in itertools.product(range(2), range(LENGTH)):
        readers = [t for t in range(LENGTH) if grid[t] == grid[i]] if grid[i] else [i]
        weight = np.zeros(GRIDS + 1)
        for reader in readers:
            seen = [j for j in range(cells) if grid[j] != grid[i]]
            for j, share in zip(seen, shares(np.array([q[reader, head] @ k[j, head] / 2 for j in seen])), strict=True):
                weight[grid[j]] += share / SIDE**2
        weight[0] = -1.0
        if grid[i]:
            weight[grid[i]] = np.inf
        ranked = sorted(range(1, GRIDS + 1), key=lambda n: -weight[n])
        shifts.add(tuple(ranked))
        place = {n: cells - SIDE**2 * (1 + rank) for rank, n in enumerate(ranked)}
        at = lambda t, place=place: place[grid[t]] + t % SIDE**2 if grid[t] else t  # noqa: E731
        visible = [j for j in range(LENGTH) if sees("pine", tokens_of("grids_first"), i, j)]
        scores = np.array([rotated(q[i, head], at(i)) @ rotated(k[j, head], at(j)) / 2 for j in visible])
        expected[i, 4 * head : 4 * head + 4] = shares(scores) @ v[visible, head]
    assert len(shifts) > 3  # readers differ in their order
    np.testing.assert_allclose(out, expected @ np.asarray(module.output.kernel[...], np.float64), rtol=2e-4, atol=1e-6)


def test_half_a_turn_of_the_grid_keeps_rings_and_what_text_reads():
    """CCA: cells that change places with those opposite, contents along, are at the same positions as before."""
    x, cells = inputs(), GRIDS * SIDE**2
    order = np.concatenate([np.arange(SIDE**2)[::-1] + SIDE**2 * grid for grid in range(GRIDS)])
    positions = fields_of("cca", context())["positions"]
    np.testing.assert_array_equal(positions[:, order], positions[:, :cells])
    base = mixer("cca")(x, context())
    turned = mixer("cca")(x.at[:, :cells].set(x[:, order]), context())
    np.testing.assert_allclose(turned, np.concatenate([base[:, order], base[:, cells:]], axis=1), rtol=0, atol=2e-5)


def test_percepts_of_saisa_are_read_from_their_inputs_and_written_to_nowhere():
    vectors = jax.random.normal(jax.random.key(3), (1, LENGTH, 5))
    known = Context(token_types=context().token_types, fields=context().fields, vectors=vectors)
    x, cells = inputs(), GRIDS * SIDE**2
    base = mixer("saisa")(x, known)
    assert not base[:, :cells].any()
    np.testing.assert_array_equal(mixer("saisa")(x.at[:, :cells].add(1.0), known), base)
    changed = Context(token_types=known.token_types, fields=known.fields, vectors=vectors.at[:, 4].add(1.0))
    assert (np.abs(mixer("saisa")(x, changed) - base)[0, cells:].max(axis=1) > 1e-4).all()
    with pytest.raises(UserError, match="inputs=5: the percepts' continuous inputs have the width 6"):
        mixer("saisa")(x, Context(token_types=known.token_types, vectors=jnp.zeros((1, LENGTH, 6))))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="segments are laid out by rotary positions"):
        PositionInvariantAttention(positions=None)
    with pytest.raises(UserError, match="PositionInvariantAttention has none"):
        PositionInvariantAttention(dropout=0.1)
    with pytest.raises(UserError, match="InjectedAttention takes no cross=True: what it reads beside"):
        InjectedAttention(cross=True)
    with pytest.raises(UserError, match="PlannedAttention cannot stream"):
        PlannedAttention().build(WIDTH, Place(0, 2), nnx.Rngs(params=jax.random.key(0))).init_state(1, 8)
