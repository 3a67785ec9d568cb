"""Checks before several processes begin a run together: same program, same devices, same folder, same data."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax

from recollect.configuration import UserError, to_json
from recollect.training.distributed.host import current_host
from recollect.training.experiment import Experiment
from recollect.training.run_state import run_directory


def check_start(experiments: list[Experiment]) -> None:
    """Refuses a run whose processes would not do the same: other configs or versions, a mesh without some of the
    devices, or a run folder that only some see. Called where there are several.

    Raises:
      UserError: the same one in every process.
    """
    host = current_host()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    host.check_equal(
        {
            "packages": {name: importlib.metadata.version(name) for name in packages},
            "device": jax.local_devices()[0].device_kind,
            "local devices": jax.local_device_count(),
            "config": [to_json(experiment) for experiment in experiments],
        }
    )
    for experiment in experiments:
        used, available = experiment.run.mesh.devices, jax.device_count()
        if used != available:
            raise UserError(
                f"run.mesh uses {used} of the {available} devices of {host.count} processes; it must use all, "
                f"for example run.mesh.data={available}"
            )
        host.check_shared(run_directory(experiment))


def prepare_data(data: Any) -> None:
    """Prepares a run's data, in the main process first, so that others on its file system find it made; then compares
    what they hold.

    Raises:
      UserError: the data cannot be had, or the processes hold different texts.
    """
    host = current_host()
    if host.is_main:
        data.prepare()
    host.wait_for_all()
    if not host.is_main:
        data.prepare()
    host.check_equal({"corpus": data.corpus_digest()})
