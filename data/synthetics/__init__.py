"""Recall tasks, made on the device: a batch is a pure function of (seed, step)."""

from recollect.configuration.base import exported_names
from recollect.data.synthetics.mqar import MQAR, RecallSlice

__all__ = exported_names(globals())
