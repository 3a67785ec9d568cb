"""Recollect: efficient attention architectures in JAX.

The folders of the checkout, as one package: `from recollect.layers import SlidingWindow`.
"""

from typing import Any

__version__ = "0.1.0"


def load(path: str) -> Any:
    """Returns the model in a run's folder, an export or a Hugging Face folder: `model`, `params`, `experiment`,
    `vocabulary`, `step` and `data` (training/checkpoint/load.py).

        run = recollect.load("exported")
        logits = run.model.bind(run.params)(tokens)

    Raises:
      UserError: there is none, or it is damaged.
    """
    from recollect.training.checkpoint.load import open_run

    return open_run(path)
