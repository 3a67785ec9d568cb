"""Recall tasks, made on the device: a batch is a pure function of (seed, step).

from recollect.data.synthetics import MQAR, arrays
task = MQAR(vocab_size=256, length=64, pairs=8)
tokens, labels = arrays(task, step=0, batch_size=64)    # NumPy, (64, 64) each; -100 where nothing is asked
"""

from recollect.configuration.base import exported_names
from recollect.data.synthetics.arrays import arrays, numpy_batch
from recollect.data.synthetics.bigram_backcopy import BigramBackcopy
from recollect.data.synthetics.brevo import Brevo, BrevoSlice
from recollect.data.synthetics.compression import Compression
from recollect.data.synthetics.contract import TaskContract
from recollect.data.synthetics.copying import Copying, CopySlice
from recollect.data.synthetics.depo import Depo, DepoSlice
from recollect.data.synthetics.digit_arithmetic import DigitArithmetic, DigitSlice
from recollect.data.synthetics.fuzzy_recall import FuzzyRecall, FuzzySlice
from recollect.data.synthetics.gcog import GCOG, GCOGSlice
from recollect.data.synthetics.grid_questions import GridQuestions, GridSlice
from recollect.data.synthetics.in_context_recall import InContextRecall, RecalledTokens
from recollect.data.synthetics.induction_heads import InductionHeads
from recollect.data.synthetics.joint_recall import JointRecall, JointSlice
from recollect.data.synthetics.knowledge_conflict import ConflictSlice, KnowledgeConflict
from recollect.data.synthetics.mad import mad, mad_score, mad_settings
from recollect.data.synthetics.majority import Majority
from recollect.data.synthetics.mano import Mano, ManoSlice
from recollect.data.synthetics.memorization import Memorization
from recollect.data.synthetics.mqar import MQAR, RecallSlice
from recollect.data.synthetics.mqar_variants import (
    AskedFirstMQAR,
    CompositionalMQAR,
    ForgettingMQAR,
    MQARVariant,
    NoisyMQAR,
)
from recollect.data.synthetics.needles import Needles
from recollect.data.synthetics.ngram_lookup import LookupSlice, NGramLookup
from recollect.data.synthetics.pattern_tasks import MaskedRecall, PairSlice, SourceCopying, SourceRecall
from recollect.data.synthetics.phonebook import Phonebook, PhonebookSlice
from recollect.data.synthetics.ruler import ruler
from recollect.data.synthetics.selective_copying import SelectiveCopying, SelectiveCopySlice
from recollect.data.synthetics.set_disjointness import SetDisjointness, SetSlice
from recollect.data.synthetics.stacks import Stacks, StackSlice
from recollect.data.synthetics.state_tracking import StateTracking
from recollect.data.synthetics.task import Slice, SyntheticTask
from recollect.data.synthetics.variable_tracking import VariableTracking
from recollect.data.synthetics.word_counts import CommonWords, FrequentWords

__all__ = exported_names(globals())
