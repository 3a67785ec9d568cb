"""What is checked before several processes begin a run together."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax

from recollect.configuration import UserError, to_json
from recollect.training.distributed import processes
from recollect.training.experiment import Experiment
from recollect.training.run_state import run_directory


def check_start(experiments: list[Experiment]) -> None:
    """Refuses a run whose processes would not do the same: other configs or versions, a mesh without some of the
    devices, or a run folder that only some see. Does nothing where there is one process.

    Raises:
      UserError: the same one in every process.
    """
    if processes.process_count() == 1:
        return
    packages = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    }
    platform = jax.local_devices()[0]
    facts = {"packages": packages, "device": platform.device_kind, "local devices": jax.local_device_count()}
    processes.agree({**facts, "config": [to_json(experiment) for experiment in experiments]})
    for experiment in experiments:
        used, there = experiment.run.mesh.devices, jax.device_count()
        if used != there:
            raise UserError(
                f"run.mesh uses {used} of the {there} devices of {processes.process_count()} processes; it must use all, for example "
                f"run.mesh.data={there}"
            )
        processes.check_shared(run_directory(experiment))


def prepare_data(data: Any) -> None:
    """Prepares a run's data, in the main process first, so that others on its file system find it made; then compares
    what they hold.

    Raises:
      UserError: the data cannot be had, or the processes hold different texts.
    """
    if processes.is_main():
        data.prepare()
    processes.gather(0)
    if not processes.is_main():
        data.prepare()
    if processes.process_count() > 1 and hasattr(data, "prepared"):
        processes.agree({"corpus": data.prepared().digest})
