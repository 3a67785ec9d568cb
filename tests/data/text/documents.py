"""Documents in memory whose tokens tell where they come from."""

import numpy as np


class CountedDocuments:
    """Documents of given lengths; token t of document d is 1000 d + t + 1 (its opening token is 1000 d)."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths, np.int64)
        assert self.lengths.size == 0 or self.lengths.max() < 1000

    def __len__(self):
        return len(self.lengths)

    def tokens(self, document, start, stop):
        assert 0 <= start <= stop <= self.lengths[document]
        return np.arange(1000 * document + start, 1000 * document + stop, dtype=np.int32)
