"""The pretraining experiments: matched sizes, published layer maps, docstrings that say how to run them."""

import pytest

from recollect.configuration import UserError
from recollect.experiments import registry
from recollect.experiments.pretrain import COMPARED, small_of, variant
from recollect.experiments.pretrain_models import MODELS
from recollect.experiments.pretrain_sizes import SIZES
from recollect.experiments.pretrain_table import PATTERNS
from recollect.layers import GatedConvolution, LinearAttention, SlidingWindow
from recollect.models import FunctionalModel
from recollect.models.accounting import parameters_by_part
from recollect.training.monitoring.model_flops import training_flops_per_token

NAMES = [f"pretrain.{pattern}_{size}" for pattern in PATTERNS for size in SIZES]
COUNTED = {"30m": 30e6, "125m": 85e6, "360m": 310e6, "1b": 1.24e9}
"""Parameters outside the embedding, which the vocabulary decides."""


def outside_the_embedding(found):
    parts = parameters_by_part(FunctionalModel(found.model, 257))
    return parts["total"] - parts["embedding"]


def test_all_are_listed_with_command_hardware_and_what_was_run():
    entries = registry.entries()
    assert list(PATTERNS) == list(MODELS)
    assert {name for name in entries if name.startswith("pretrain.")} == {*NAMES, "pretrain.curves"}
    for name in NAMES:
        text = entries[name].docstring
        assert f"python main.py train {name}" in text and "Hardware: " in text and "oss" in text, name
        assert variant(name.removeprefix("pretrain.")).name == name
    assert registry.load("pretrain.kimi_linear_30m", "experiment").name == "pretrain.kimi_linear_30m"
    with pytest.raises(UserError, match="patterns are attention, based"):
        variant("attention_31m")


@pytest.mark.parametrize("size", SIZES)
def test_patterns_of_a_size_are_matched(size):
    found = {pattern: variant(f"{pattern}_{size}") for pattern in PATTERNS}
    counts = {pattern: outside_the_embedding(one) for pattern, one in found.items()}
    assert max(counts.values()) < 1.1 * min(counts.values())
    assert counts["attention"] == pytest.approx(COUNTED[size], rel=0.05)
    assert len({(one.data, one.run.steps, one.run.batch_size) for one in found.values()}) == 1


def test_products_of_a_size_are_near_each_other():
    """Attention's grow with the length, Based's not: at 2,048 tokens they are within a quarter."""
    flops = {pattern: training_flops_per_token(variant(f"{pattern}_360m")) for pattern in PATTERNS}
    assert max(flops.values()) < 1.25 * min(flops.values())
    assert flops["attention"] == pytest.approx(6 * outside_the_embedding(variant("attention_360m")), rel=0.2)


def test_published_layer_maps():
    """Arora et al. 2024, reference configurations: which of the layers are Taylor attention and windows."""
    maps = {
        "360m": (27, (1, 6, 11, 16, 21), (2, 7, 12, 17, 22)),
        "1b": (36, (1, 6, 11, 16, 21, 27, 33), (2, 7, 12, 17, 22, 28, 34)),
    }
    for size, (depth, taylor, windows) in maps.items():
        mixers = variant(f"based_{size}").model.mixers
        kinds = [
            LinearAttention if i in taylor else SlidingWindow if i in windows else GatedConvolution
            for i in range(depth)
        ]
        assert [type(mixer) for mixer in mixers] == kinds


def test_small_models_are_matched_too():
    counts = [outside_the_embedding(small_of(pattern)) for pattern in COMPARED]
    assert max(counts) < 1.1 * min(counts) and 1e6 < min(counts) < max(counts) < 1.4e6
