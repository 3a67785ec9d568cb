"""A sequence cut in pieces that run side by side is the same sequence, values and gradients."""

from __future__ import annotations

import functools

import pytest

from pallas_kernels.linear_recurrence import splitting, xla
from tests.pallas_kernels.test_linear_recurrence import CLOSE
from tests.pallas_kernels.test_linear_recurrence_family import arguments, compare


@pytest.mark.parametrize(
    ("pieces", "case"),
    [
        (3, (50, None, None, False, False)),
        (4, (63, "token", None, True, True)),
        (2, (63, "channel", None, True, True)),
        (3, (50, "token", "scalar", False, False)),
        (3, (50, "channel", "vector", True, True)),
        (7, (5, "token", "apart", True, True)),
    ],
    ids=str,
)
def test_pieces_are_the_whole(pieces, case):
    compare(functools.partial(splitting.in_pieces, xla.chunked, pieces), *arguments(*case), CLOSE)
