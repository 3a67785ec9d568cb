"""Two runs' folders compared."""

import json
from pathlib import Path

import jax
import numpy as np

from recollect.training.checkpoint.load import load_params


def assert_same_run(one: Path, two: Path, steps: int) -> None:
    """Both ended after `steps` steps with the same bits, and logged every step once, with the same numbers."""
    left, _, step = load_params(one / "checkpoints")
    right, _, other = load_params(two / "checkpoints")
    assert step == other == steps
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("loss", "step"):
        rows = [
            [json.loads(line).get(name) for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (one, two)
        ]
        assert rows[0] == rows[1], "every step is logged once, with the same numbers"
