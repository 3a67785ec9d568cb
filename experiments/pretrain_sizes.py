"""Sizes of `experiments/pretrain.py`, and models whose layers take turns."""

import dataclasses
from typing import Any

from recollect.layers import MixerConfig
from recollect.layers.modules import SwiGLU
from recollect.models import LanguageModel, repeat


@dataclasses.dataclass(frozen=True)
class BasedLayers:
    """Based's shape at a size: `window` keys are seen; `layers` are patterns of c, t and w and how often each
    repeats."""

    width: int
    heads: int
    window: int
    layers: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Size:
    """The attention model of one size, and what is common to all mixers there.

    Attributes:
      hidden: of its SwiGLU, about 8/3 widths.
      length: tokens per row.
      rows, pieces: rows per step, and microbatches that they are split into to fit one device.
      steps: 20,000 steps of 256 rows of 2,048 tokens are 10 billion tokens.
    """

    width: int
    heads: int
    depth: int
    hidden: int
    based: BasedLayers
    length: int = 2048
    window: int = 512
    rows: int = 256
    pieces: int = 1
    steps: int = 20_000


SIZES = {
    "30m": Size(512, 8, 10, 1280, BasedLayers(512, 8, 65, {"ctwcc": 2}), length=512, window=128, rows=8, steps=1000),
    "125m": Size(768, 12, 12, 2048, BasedLayers(768, 12, 129, {"ctwcc": 2, "ctw": 1}), pieces=4),
    "360m": Size(1024, 16, 24, 2816, BasedLayers(1024, 16, 129, {"ctwcc": 5, "cc": 1}), pieces=8),
    "1b": Size(2048, 16, 24, 5504, BasedLayers(1792, 16, 129, {"ctwcc": 5, "cctwcc": 1, "cctwc": 1}), pieces=32),
}

CURVES = Size(128, 4, 6, 336, BasedLayers(128, 4, 33, {"ctwccc": 1}), length=512, window=64, rows=8, steps=400)
"""The models of `pretrain.curves`."""


def in_turn(
    of: Size, *mixers: MixerConfig, depth: int | None = None, narrower: int = 0, **fields: Any
) -> LanguageModel:
    """Returns a model whose layers cycle through the mixers, with MLPs of `narrower` fewer hidden units; `fields` are
    the model's other ones."""
    fields = {"mlp": SwiGLU(hidden=of.hidden - narrower), **fields}
    return LanguageModel(width=of.width, stages=repeat(*mixers, depth=depth or of.depth), **fields)
