"""Recall tasks, made on the device: a batch is a pure function of (seed, step).

from recollect.data.synthetics import MQAR, arrays
task = MQAR(vocab_size=256, length=64, pairs=8)
tokens, labels = arrays(task, step=0, batch_size=64)    # NumPy, (64, 64) each; -100 where nothing is asked
"""

from recollect.configuration.base import exported_names
from recollect.data.synthetics.arrays import arrays
from recollect.data.synthetics.contract import TaskContract
from recollect.data.synthetics.mqar import MQAR, RecallSlice
from recollect.data.synthetics.task import Slice, SyntheticTask

__all__ = exported_names(globals())
