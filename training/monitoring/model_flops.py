"""Floating-point operations of a training step, for MFU.

They are those of `recollect.models.accounting.flops_per_token`, taken from the operations' XLA backends: causal
attention counts the blocks up to the diagonal, not the whole square.
"""

from __future__ import annotations

from typing import Any

from recollect.models.accounting import flops_per_token
from recollect.models.functional import FunctionalModel
from recollect.pallas_kernels import dispatch
from recollect.training.experiment import Experiment


def training_flops_per_token(experiment: Experiment) -> float:
    """Returns three times the forward products per token at the data's length, the head's included: at every token of
    a text, at labelled ones of a recall task."""
    data: Any = experiment.data
    model = FunctionalModel(experiment.model, data.vocabulary)
    with dispatch.aimed_at("cpu", "cpu"):  # products of kernels and libraries cannot be counted
        return 3 * flops_per_token(model, data.longest)
