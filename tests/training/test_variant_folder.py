"""Names of the folders of variants: short, different, without what is a default."""

import pytest

from recollect.configuration import apply_overrides
from recollect.experiments.registry import load
from recollect.training.variant_folder import variant_name


@pytest.mark.parametrize(
    ("experiment", "overrides", "name"),
    [
        ("mqar.attention", ["data.pairs=3"], "pairs=3"),
        ("mqar.attention", ["optimizer.frozen=embedding"], "frozen=embedding"),
        ("mqar.attention", ["optimizer.frozen=embedding,stack.*"], "frozen=embedding,stack._"),
        ("mqar.attention", ["optimizer=Lion"], "optimizer=Lion"),
        ("mqar.attention", ["optimizer=Lion", "optimizer.weight_decay=0.3"], "optimizer=Lion,weight_decay=0.3"),
        ("mqar.attention", ["model.stages.0.pattern.1.positions=Rotary"], "pattern.1.positions=Rotary"),
        ("mqar.attention", ["run.seed=3", "run.steps=9"], "seed=3"),
        ("text.based", ["model.stages.0.pattern.0.kernel=5"], "pattern.0.kernel=5"),
    ],
)
def test_a_variant_is_named_by_what_differs(experiment, overrides, name):
    before = load(experiment, "experiment")
    assert variant_name(before, apply_overrides(before, overrides)) == f"{experiment},{name}"


def test_variants_of_two_parts_have_two_names():
    before = load("text.based", "experiment")
    paths = [f"model.stages.0.pattern.{index}.kernel" for index in (0, 3)]
    assert len({variant_name(before, apply_overrides(before, [f"{path}=5"])) for path in paths}) == 2
