"""Data sets: recall tasks made on the device (`synthetics/`) and text (`text/`), as configs that return batches."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "batch": "Batch DataConfig",
        "synthetics": "BigramBackcopy Brevo BrevoSlice CommonWords ConflictSlice CopySlice Copying Depo DepoSlice "
        "DigitArithmetic DigitSlice FrequentWords GCOG GCOGSlice InductionHeads KnowledgeConflict LookupSlice "
        "MQAR Majority Mano ManoSlice NGramLookup Needles Phonebook PhonebookSlice RecallSlice "
        "SelectiveCopySlice SelectiveCopying SetDisjointness SetSlice Slice StackSlice Stacks StateTracking "
        "SyntheticTask TaskContract VariableTracking arrays ruler",
        "text": "Chunked Decomposed Packed Preparation Text open_prepared",
        "tokenizers": "Tokenizer open_tokenizer",
    },
)
