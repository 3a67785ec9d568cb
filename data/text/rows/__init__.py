"""Rows of tokens from documents: packed, chunked, in streams or decomposed, with a curriculum."""

from recollect.data.text.rows.base import RowPlan, Sequences, read_rows
from recollect.data.text.rows.by_number import GlobalBatches
from recollect.data.text.rows.chunked import Chunked
from recollect.data.text.rows.decomposed import Decomposed
from recollect.data.text.rows.packed import Packed
from recollect.data.text.rows.streams import Streams

__all__ = ["Chunked", "Decomposed", "GlobalBatches", "Packed", "RowPlan", "Sequences", "Streams", "read_rows"]
