"""Experiments read from JSON, wherever one was saved: in a checkpoint, a failure's folder, a task of a cluster."""

from typing import Any

import recollect.data.synthetics
import recollect.data.text.dataset  # noqa: F401 (with the line above: config classes that the JSON may name)
from recollect.configuration import Config, UserError, from_json
from recollect.training.experiment import Experiment


def experiment_from_json(data: Any, where: str) -> Experiment:
    """Returns the experiment that `to_json` wrote. Classes of a user's own files must have been imported.

    Args:
      where: what holds it, the beginning of the error.

    Raises:
      UserError: it cannot be read, or is another config.
    """
    return as_experiment(from_json(data), where)


def as_experiment(config: Config, where: str) -> Experiment:
    """Returns `config`; raises UserError where it is no experiment."""
    if not isinstance(config, Experiment):
        raise UserError(f"{where} holds a {type(config).__name__}, not an Experiment")
    return config
