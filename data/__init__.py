"""Data sets: recall tasks made on the device (`synthetics/`) and text (`text/`), as configs that return batches."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "batch": "Batch DataConfig",
        "synthetics": "MQAR RecallSlice Slice SyntheticTask TaskContract arrays",
        "text": "Chunked Decomposed Packed Preparation Text open_prepared",
        "tokenizers": "Tokenizer open_tokenizer",
    },
)
