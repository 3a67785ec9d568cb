"""Data sets: recall tasks made on the device (`synthetics/`) and text (`text/`), as configs that return batches."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "batch": "Batch DataConfig",
        "synthetics": "AskedFirstMQAR BigramBackcopy Brevo BrevoSlice CommonWords CompositionalMQAR "
        "Compression ConflictSlice CopySlice Copying Depo DepoSlice DigitArithmetic "
        "DigitSlice ForgettingMQAR FrequentWords FuzzyRecall FuzzySlice GCOG GCOGSlice "
        "GridQuestions GridSlice InContextRecall InductionHeads JointRecall JointSlice "
        "KnowledgeConflict LookupSlice MQAR MQARVariant Majority Mano ManoSlice MaskedRecall "
        "Memorization NGramLookup Needles NoisyMQAR PairSlice Phonebook PhonebookSlice "
        "RecallSlice RecalledTokens SelectiveCopySlice SelectiveCopying SetDisjointness "
        "SetSlice Slice SourceCopying SourceRecall StackSlice Stacks StateTracking "
        "SyntheticTask TaskContract VariableTracking arrays mad mad_score mad_settings "
        "numpy_batch ruler",
        "text": "Chunked Decomposed Packed Preparation Text open_prepared",
        "tokenizers": "Tokenizer open_tokenizer",
    },
)
