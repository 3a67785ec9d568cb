"""Data sets: recall tasks made on the device (`synthetics/`) and text (`text/`), as configs that return batches."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "batch": "Batch DataConfig",
        "synthetics": "BigramBackcopy Brevo BrevoSlice CommonWords ConflictSlice Depo DepoSlice DigitArithmetic "
        "DigitSlice FrequentWords GCOG GCOGSlice KnowledgeConflict MQAR Majority Mano ManoSlice Needles RecallSlice "
        "SetDisjointness SetSlice Slice StateTracking SyntheticTask TaskContract VariableTracking arrays ruler",
        "text": "Chunked Decomposed Packed Preparation Text open_prepared",
        "tokenizers": "Tokenizer open_tokenizer",
    },
)
