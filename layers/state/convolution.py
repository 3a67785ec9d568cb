"""The decoding state of mixers with one convolution."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from recollect.layers.mixer import Cursor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvolutionState:
    """Past inputs of a convolution: of a short one the last kernel - 1, (b, w, f), oldest first, zeros before the
    document; of a long one its cache."""

    inputs: Any
    cursor: Cursor
