"""Every global batch of a training run by number.

    batches = GlobalBatches(documents, plan, sequences, length=512, batch_size=8, seed=0, shuffle=True)
    batches.read(1000, 0, batches.rows(1000))       # batch 1000, whole; or any range of its rows

A batch is a function of (seed, number): which bucket it takes, which rows, and in which order. So a run continues from
a number alone, after any number of restarts, and any process reads just the rows that its devices hold, whatever the
number of processes.

A batch has `batch_size * length` tokens, so a batch of shorter rows has more of them. Rows are taken in an order drawn
anew for each epoch; a batch at an epoch's end takes its other rows from the next one. The rows of a plan that
`continues` are cut into one stream per row of a batch, which each batch reads a row further.

Easy to get wrong: an epoch's order is Grain's `index_shuffle`, which computes any element of a permutation without the
rest of it.
"""

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.data.text.rows.base import Documents, RowPlan, Sequences, read_rows
from recollect.data.text.rows.curriculum import BucketSchedule
from recollect.data.text.rows.stable_random import seed_of

_EPOCHS = 4
_ROUNDS = 4


class GlobalBatches:
    """The batches of a plan; see the module.

    Args:
      documents: the documents that the plan was made for.
      plan: rows of these documents.
      sequences: the config that made the plan: cycles and odds.
      length: tokens per row that `batch_size` counts.
      batch_size: rows of `length` tokens per batch.
      seed: of orders and draws.
      shuffle: rows in an order of their own each epoch, or as the plan has them.

    Raises:
      UserError: the corpus is empty, or has fewer rows than a batch of streams.
    """

    def __init__(
        self,
        documents: Documents,
        plan: RowPlan,
        sequences: Sequences,
        *,
        length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
    ):
        if not any(plan.counts):
            raise UserError("the corpus has no training documents, so there are no rows to train on")
        self.documents = documents
        self.plan = plan
        self.seed = seed
        self.shuffle = shuffle
        self._rows = tuple(batch_size * length // row_length for row_length in plan.lengths)
        if plan.continues and plan.counts[0] < self._rows[0]:
            raise UserError(
                f"run.batch_size={batch_size}: needs as many streams of at least one row, and the training text has "
                f"{plan.counts[0]} rows of {length} tokens"
            )
        self._schedule = BucketSchedule(plan.counts, self._rows, *sequences.shares(plan), seed)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Row lengths that batches can have, ascending."""
        return tuple(length for length, count in zip(self.plan.lengths, self.plan.counts, strict=True) if count)

    def row_length(self, number: int) -> int:
        """Returns the tokens per row of batch `number`."""
        return self.plan.lengths[self._locate(number)[0]]

    def rows(self, number: int) -> int:
        """Returns the rows of batch `number`."""
        return self._rows[self._locate(number)[0]]

    def read(self, number: int, begin: int, end: int) -> Batch:
        """Returns rows `begin` to `end` of batch `number`, as NumPy arrays; `segments` is None where not needed.

        Raises:
          ValueError: the batch has no such rows.
        """
        group, index = self._locate(number)
        if not 0 <= begin <= end <= self._rows[group]:
            raise ValueError(f"rows {begin} to {end}: batch {number} has {self._rows[group]}")
        first, length = index * self._rows[group], self.plan.lengths[group]
        spans = (self.plan.spans(group, self._row(group, first + place)) for place in range(begin, end))
        return read_rows(self.documents, spans, end - begin, length, segmented=self.plan.segmented)

    def _locate(self, number: int) -> tuple[int, int]:
        return (0, number) if len(self._rows) == 1 else self._schedule.locate(number)

    def _row(self, group: int, place: int) -> int:
        """Returns the row at a place of a group's endless order."""
        if self.plan.continues:
            number, stream = divmod(place, self._rows[group])
            per_stream = self.plan.counts[group] // self._rows[group]
            return stream * per_stream + number % per_stream
        epoch, place = divmod(place, self.plan.counts[group])
        if not self.shuffle:
            return place
        # Importing Grain takes a second.
        from grain.experimental import index_shuffle

        seed = seed_of((self.seed, _EPOCHS, group, epoch))
        return int(index_shuffle(index=place, max_index=self.plan.counts[group] - 1, seed=seed, rounds=_ROUNDS))
