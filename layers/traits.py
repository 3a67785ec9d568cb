"""What a mixer's config declares about it: the laws of the contract suite that it can be held to, and its limits."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Traits:
    """States which laws a mixer can be held to.

    Attributes:
      causal: no output depends on a later input; of a cross mixer, on a later query.
      cross: reads `context.source`; it streams from `init_cross_state`, not from `init_state`.
      symmetry: what leaves the outputs of a mixer that is not causal as they are: any "permutation" of the tokens with
        their positions, or the "reversal" of their order; None where neither does.
      streams: has `init_state` (`init_cross_state`) and `extend`.
      exact_causality: causal bit for bit; False where a Fourier transform spreads rounding, or where later tokens'
        choices may change how a query is grouped and so how its sums round (then to 1e-5).
      maximum_length: longest input the configuration allows; None for any.
      landmark_block: ordinary tokens before each landmark the model must insert for this mixer; None for a mixer that
        needs none.
    """

    causal: bool = True
    cross: bool = False
    symmetry: Literal["permutation", "reversal"] | None = None
    streams: bool = True
    exact_causality: bool = True
    maximum_length: int | None = None
    landmark_block: int | None = None
