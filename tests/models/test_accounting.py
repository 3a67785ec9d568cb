"""What a model costs, against arrays that exist and products counted by hand."""

import chz
import jax
import numpy as np
import pytest

from recollect.layers import Attention, Landmark, LinearAttention, ShortConvolution, SlidingWindow
from recollect.layers.modules.feature_maps import EluPlusOne
from recollect.layers.modules.mlp import SwiGLU
from recollect.layers.modules.positions import LearnedPositions
from recollect.models import FunctionalModel, LanguageModel, Stage, repeat
from recollect.models.accounting import flops_per_token, parameters_by_part, state_elements_at
from recollect.models.functional import count, state_bytes_at

MIXED = LanguageModel(
    width=16,
    stages=(
        Stage(pattern=(Landmark(block=4, heads=2), LinearAttention(heads=2, feature_dim=3)), repeats=2),
        Stage(pattern=(SlidingWindow(window=8),)),
    ),
    mlp=SwiGLU(hidden=8),
    positions=LearnedPositions(maximum=64),
    tied=False,
)


def test_parts_add_up():
    model = FunctionalModel(MIXED, 23)
    parts = parameters_by_part(model)
    total = parts.pop("total")
    assert total == count(model.abstract_params()) == sum(parts.values())
    taylor = 2 * 16 * 6 + 2 * 16 * 16
    assert parts == {
        "embedding": 23 * 16,
        "positions": 64 * 16,
        "landmark": 16,
        "mixers: Landmark": 2 * 4 * 16 * 16,
        "mixers: LinearAttention": 2 * taylor,
        "mixers: SlidingWindow": 4 * 16 * 16,
        "mlp": 5 * 3 * 16 * 8,
        "norms": (2 * 5 + 1) * 16,
        "head": 16 * 23,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_bytes_are_those_of_the_arrays(dtype):
    config = chz.replace(MIXED, dtype=dtype)
    model = FunctionalModel(config, 23)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract_params())
    init = jax.jit(lambda params, length: model.bind(params).init_state(1, length).layers, static_argnums=1)
    lengths = [5, 40, 64]
    measured = {
        str(length): sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(init(params, length)))
        for length in lengths
    }
    assert state_bytes_at(config, 23, [*lengths, 65, 1000]) == measured  # 64 positions: longer ones are left out
    assert state_elements_at(config, 23, 40) == sum(leaf.size for leaf in jax.tree.leaves(init(params, 40)))


def test_what_grows_with_length_and_what_does_not():
    def at(mixer):
        return state_bytes_at(LanguageModel(width=16, stages=repeat(mixer, depth=2)), 23, [64, 128, 256])

    linear, window, full = at(LinearAttention(heads=2)), at(SlidingWindow(window=16)), at(Attention(heads=2))
    assert len(set(linear.values())) == len(set(window.values())) == 1
    assert (
        full["256"] - full["128"] == 2 * (full["128"] - full["64"]) == 2 * 128 * (2 * 16 * 4 + 8)
    )  # keys, values, position, segment


def test_flops_are_those_of_the_products():
    width, hidden, vocabulary = 64, 256, 512

    def cost(repeats):
        stages = (Stage(pattern=(ShortConvolution(kernel=3),), repeats=repeats),)
        return flops_per_token(
            FunctionalModel(LanguageModel(width=width, stages=stages, mlp=SwiGLU(hidden=hidden)), vocabulary), 32
        )

    layer, head = 2 * 3 * width * hidden + 2 * 3 * width, 2 * width * vocabulary
    assert cost(2) == pytest.approx(2 * layer + head, rel=0.1)
    assert cost(5) - cost(2) == pytest.approx(3 * layer, rel=0.1)  # a scan's body counts as often as it runs


def test_flops_do_not_depend_on_how_the_stack_runs():
    base = LanguageModel(width=16, stages=repeat(ShortConvolution(), depth=3))
    costs = {
        flops_per_token(FunctionalModel(chz.replace(base, **fields), 23), 8)
        for fields in ({}, {"remat": "full"}, {"unroll": True})
    }
    assert len(costs) == 1


def test_flops_of_loops_over_chunks_are_those_of_all_chunks():
    """A recurrence costs a token the same at any length; its form scans over chunks."""

    def cost(length):
        mixer = LinearAttention(heads=2, feature_dim=8, feature_map=EluPlusOne())
        return flops_per_token(FunctionalModel(LanguageModel(width=32, stages=repeat(mixer, depth=2)), 23), length)

    assert cost(2048) == pytest.approx(cost(512), rel=0.02)
