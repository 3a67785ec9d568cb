"""The config of low-rank updates; recollect/models/adaptation.py makes them."""

from __future__ import annotations

import chz

from recollect.configuration import Config, at_least, requires


@chz.chz(typecheck=True)
class LoRA(Config):
    """Low-rank updates of linear maps (Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1): W becomes
    W + alpha / rank A B, with A (inputs, rank) drawn from N(0, 1 / inputs) and B (rank, outputs) 0 at first.

    Attributes:
      rank: columns of A, rows of B.
      alpha: scale of the update.
      layers: which linear maps: patterns of their names, separated by commas ("*.query,*.value"; "*" is all).
      train_rest: train the other parameters too; False trains the updates alone.
    """

    rank: int = chz.field(default=8, validator=at_least(1))
    alpha: float = chz.field(default=16.0, validator=requires(lambda value: value > 0, "must be positive"))
    layers: str | tuple[str, ...] = "*.mixer.*"
    train_rest: bool = False
