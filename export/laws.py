"""The law of a mixer in a model that is exported (see layers/laws.py)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recollect.export.safetensors_format import export_safetensors, load_safetensors
from recollect.models import FunctionalModel, LanguageModel, repeat


def law_10_export_and_back(subject: Any) -> None:
    """A model with the mixer that was exported and loaded has the same config, and bit for bit the same logits."""
    model = FunctionalModel(LanguageModel(width=16, stages=repeat(subject.config, depth=1)), 24)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 21), 0, 24)
    run = jax.jit(lambda params, tokens: model.bind(params)(tokens))
    with tempfile.TemporaryDirectory() as folder:
        export_safetensors(params, model.config, Path(folder) / "out", extra={})
        loaded, config = load_safetensors(Path(folder) / "out")
        if config != model.config:
            raise AssertionError(f"the config is another after export: {config}")
        before, after = np.asarray(run(params, tokens)), np.asarray(run(loaded, tokens))
    for row, token in np.argwhere((before != after).any(-1)):
        raise AssertionError(f"logits after export differ: first at row {row}, token {token}")


LAWS: dict[str, Callable[[Any], None]] = {"law_10_export_and_back": law_10_export_and_back}
"""The law of this file by name."""
