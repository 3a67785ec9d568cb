"""Text: sources of documents, their preparation, and the rows that a model trains on.

Text(source="prepared/mine", length=1024, sequences=Packed())        # the config of a run's data
open_prepared("prepared/mine").train.tokens(0)                       # the documents themselves

Workers of a preparation import this package, but not JAX: hence the names are lazy.
"""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "dataset": "Text",
        "preparation.prepare": "Preparation",
        "preparation.reader": "open_prepared",
        "rows": "Chunked Decomposed Packed Streams",
    },
)
