"""The backends that a model's mixers run on, logged before training starts."""

from __future__ import annotations

from collections import Counter

import chz
import jax

from recollect.data.batch import Batch
from recollect.layers.mixer import Context
from recollect.models.functional import FunctionalModel, Params
from recollect.models.language_model import LanguageModel
from recollect.models.stack import Stage
from recollect.pallas_kernels import dispatch

# Only this platform's kernels are reported.
KERNELS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}


def operations_by_mixer(config: LanguageModel, batch: Batch) -> list[str]:
    """Returns a line per kind of mixer and operation: its backend, and why this platform's kernel was passed over.

    Each kind of mixer is traced alone, forward only, for the device that is traced for now.

    Args:
      batch: shapes, as `DataConfig.batch_shapes` returns.
    """
    lines = []
    for mixer, layers in Counter(config.mixers).items():
        model = FunctionalModel(chz.replace(config, stages=(Stage(pattern=(mixer,)),)), 2)

        def run(params: Params, batch: Batch, model: FunctionalModel = model) -> jax.Array:
            return model.bind(params).hidden(batch.tokens, Context(segments=batch.segments)).hidden

        with dispatch.recorded_choices() as choices:
            jax.eval_shape(run, model.abstract_params(), batch)
        name = type(mixer).__name__ + (f" in {layers} layers" if layers > 1 else "")
        lines += [f"{name}: {_choice(choice, times)}" for choice, times in Counter(choices).items()]
    return lines


def _choice(choice: dispatch.Choice, times: int) -> str:
    kernel = KERNELS.get(dispatch.device().platform)
    reasons = [f"{backend}: {reason}" for backend, reason in choice.passed_over if backend == kernel]
    return (
        f"{choice.operation} on {choice.backend}"
        + (f", {times} times" if times > 1 else "")
        + "".join(f" (not {one})" for one in reasons)
    )
