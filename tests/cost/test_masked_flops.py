"""Work that masks leave, against counts written out for three designs."""

import chz
import numpy as np
import pytest

from recollect.cost.masked_flops import describe_masks, mask_work
from recollect.experiments import mm
from recollect.layers import ShortConvolution
from recollect.models import repeat
from recollect.pallas_kernels.masks import Causal


def test_tiles_of_a_causal_mask_are_counted():
    work = mask_work(Causal(), {"positions": np.arange(10)[None]}, 10, tile=4)
    assert (work.allowed, work.queries, work.keys) == (55, 10, 10)
    assert (work.tiles, work.visited_tiles, work.full_tiles) == (9, 6, 1)  # the last row of tiles holds padding
    assert work.visited == 4 * 4 + 4 * 8 + 2 * 10


@pytest.mark.parametrize(
    ("name", "allowed", "queries"),
    [
        ("causal", 34 * 35 // 2, 34),
        ("ee_mllm", 34 * 35 // 2 - 16 * 15 // 2, 34),
        ("saisa", 34 * 35 // 2 - 16 * 17 // 2, 18),
    ],
)
def test_flops_are_those_of_the_rows_that_a_design_uses(name, allowed, queries):
    """16 cells and 18 tokens of text, one tile; width 32, MLPs of 64, six answers, continuous inputs of 20 numbers."""
    experiment = mm.variant(name)
    of_layer, total = describe_masks(experiment)
    assert f": {allowed:,} of 1,156 pairs allowed; 1 of 1 tiles of 64 visited" in of_layer
    layer = 2 * 32 * 32 * queries + 2 * 32 * 32 * 34 + 2 * 32 * 64 * queries + 2 * 34 * 34 * 32
    layer += (20 * 32 + 32 * 32) * 16 if name == "saisa" else 0
    products = 2 * layer + 20 * 32 * 16 + 6 * 32 * experiment.data.vocabulary
    assert total.endswith(f"an example of 34 tokens by these schedules: {2 * products:,}")


def test_other_mixers_are_left_out():
    experiment = mm.variant("causal")
    plain = chz.replace(experiment, model=chz.replace(experiment.model, stages=repeat(ShortConvolution(), depth=1)))
    assert list(describe_masks(plain)) == []
