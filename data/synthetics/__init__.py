"""Recall tasks, made on the device: a batch is a pure function of (seed, step)."""

from recollect.data.synthetics.mqar import MQAR, RecallSlice

__all__ = ["MQAR", "RecallSlice"]
