"""The layouts of the transformers library, one module each:

config_of(model)            fields of config.json; what they cannot say, `requirements.require_same` finds
model_of(config)            the model of a config.json
tensors_of(model, kind)     the table of tensors, which both directions use
fits(model)                 whether the mixers are the layout's, by their kinds
"""

from __future__ import annotations

from typing import Any

from recollect.export.huggingface.layouts import (
    code,
    diffllama,
    flash_linear_attention,
    gpt2,
    gpt_oss,
    kimi_linear,
    lfm2,
    mamba,
    mamba2,
    minimax,
    qwen3_next,
    recurrent_gemma,
    rotary_decoders,
    rwkv7,
)
from recollect.models import LanguageModel

_HYBRIDS = (
    *(mamba, mamba2, qwen3_next, kimi_linear, recurrent_gemma, lfm2, diffllama, gpt_oss),
    *(flash_linear_attention, rwkv7),
)

LAYOUTS: dict[str, Any] = {
    kind: module for module in (rotary_decoders, gpt2, *_HYBRIDS, minimax, code) for kind in module.CLASSES
}
"""Module that knows a layout, by its `model_type`."""

UNTIED = (kimi_linear, recurrent_gemma)
"""Layouts whose head is never the embedding's transpose: a copy is written."""


def layout_of(model: LanguageModel) -> Any:
    """Returns the module of the layout that may express a model."""
    if model.residual == "normalised":
        return minimax
    if model.positions is not None:
        return gpt2
    return next((module for module in _HYBRIDS if module.fits(model)), rotary_decoders)
