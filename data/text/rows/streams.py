"""Streams: all documents one after the other in a random order, cut into as many streams as a batch has rows. Row r of
each batch goes on where row r of the batch before ended, as training that carries states between batches needs
(`run.carry_state`); at the end of an epoch every stream begins again.

Documents are not kept apart: a state goes on from one to the next, as in Transformer-XL's training. What is left after
the last row of `length` tokens that all streams have is not read.
"""

from __future__ import annotations

from typing import Any

import chz
import numpy as np
from jaxtyping import Int

from recollect.data.text.rows.base import Sequences
from recollect.data.text.rows.chunked import ChunkedPlan


@chz.chz(typecheck=True)
class Streams(Sequences):
    """Documents in as many streams as a batch has rows; `data.shuffle` moves none of them."""

    def plan(self, lengths: Int[np.ndarray, " documents"], length: int, seed: int) -> StreamPlan:
        return StreamPlan(lengths, length, seed)


class StreamPlan(ChunkedPlan):
    """Rows of the concatenation, all full; which of them a batch has: `GlobalBatches`."""

    continues = True

    def __init__(self, lengths: Int[np.ndarray, " documents"], length: int, seed: int):
        super().__init__(lengths, length, seed, document_mask=False)
        self.counts = (int(self._begin[-1]) // length,)

    def facts(self) -> dict[str, Any]:
        """Returns the number of rows."""
        return {"rows": self.counts[0]}
