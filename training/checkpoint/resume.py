"""What an earlier process left in a run's checkpoints: deleted where it is incomplete, verified, set aside where it is
damaged, loaded. Every process of a run calls these functions."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from recollect.configuration import UserError
from recollect.configuration.io import first_line
from recollect.configuration.machine import environment
from recollect.configuration.read_json import read_json
from recollect.training.checkpoint.integrity import damage
from recollect.training.checkpoint.orbax_folder import Checkpoints, quiet
from recollect.training.distributed.host import current_host
from recollect.training.run_state import RunProgress, RunState

Log = Callable[[str], None]

UNFINISHED = ("*.orbax-checkpoint-tmp", "*.writing")
"""Folders of saves that were cut off; `.writing` and `.retired` are names of earlier versions."""


def delete_unfinished(checkpoints: Checkpoints, log: Log) -> None:
    """Deletes what a process that died while saving has left, and logs that. To be called before the first save."""
    if current_host().is_main and checkpoints.directory.is_dir():
        for path in checkpoints.directory.glob("*.retired"):
            shutil.rmtree(path, ignore_errors=True)
        for path in sorted(path for pattern in UNFINISHED for path in checkpoints.directory.glob(pattern)):
            log(f"checkpoint {checkpoints.directory / path.stem} was cut off while it was written: incomplete; deleted")
            shutil.rmtree(path, ignore_errors=True)
    checkpoints.changed()


def newest_good(checkpoints: Checkpoints, log: Log = print, before: int | None = None) -> int | None:
    """Returns the newest step (less than `before`, if given) whose files are whole; None: none was ever saved.

    Damaged ones on the way are named and set aside.

    Raises:
      UserError: there were checkpoints and all are damaged.
    """
    for step in reversed(checkpoints.steps()):
        if before is not None and step >= before:
            continue
        wrong = problem(checkpoints, step)
        if wrong is None:
            return step
        set_aside(checkpoints, step, wrong, log)
    refuse_if_all_damaged(checkpoints)
    return None


def problem(checkpoints: Checkpoints, step: int) -> str | None:
    """Returns what is wrong with a checkpoint's files, or None. The main process reads them all, for every
    process."""
    host = current_host()
    return host.broadcast(damage(checkpoints.directory / str(step)) if host.is_main else None)


def set_aside(checkpoints: Checkpoints, step: int, wrong: str, log: Log) -> None:
    """Moves a damaged checkpoint to damaged/ and logs that."""
    if current_host().is_main:
        folder = checkpoints.directory / "damaged"
        folder.mkdir(exist_ok=True)
        number = 1 + sum(path.name.startswith(f"{step}-") for path in folder.iterdir())
        log(f"checkpoint {checkpoints.directory / str(step)} is damaged: {wrong}; set aside as damaged/{step}-{number}")
        os.rename(checkpoints.directory / str(step), folder / f"{step}-{number}")
    checkpoints.changed()


def refuse_if_all_damaged(checkpoints: Checkpoints) -> None:
    """Raises UserError when nothing but damaged checkpoints is left: starting again from step 0 must be the
    user's choice."""
    folder = checkpoints.directory / "damaged"
    if not checkpoints.steps() and folder.is_dir() and any(folder.iterdir()):
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise UserError(
            f"every checkpoint of {checkpoints.directory} is damaged ({names}); "
            f"delete {folder} to start again from step 0"
        )


def load(checkpoints: Checkpoints, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the state of a step, every array placed as `abstract` asks, and `extra`. Files are not verified here:
    see `problem`.

    Args:
      abstract: a tree like the state saved, of arrays or ShapeDtypeStructs whose `sharding` says where each goes:
        another mesh, another number of devices or processes than the state was saved from. Without one it goes onto
        the first device.

    Raises:
      UserError: the checkpoint is of another structure, or cannot be read.
    """
    checkpoints.wait()
    folder = checkpoints.directory / str(step)
    with reading(folder) as reader:
        return restore(reader, folder, abstract), read_json(folder / "meta.json")["extra"]


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[Any]:
    """Yields Orbax's reader of a checkpoint; whatever is raised meanwhile becomes a UserError that names the folder."""
    import orbax.checkpoint as ocp

    quiet()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            yield reader
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise UserError(f"checkpoint {folder} cannot be read: {first_line(error)}") from error


def restore(reader: Any, folder: Path, abstract: Any, *, partial: bool = False) -> Any:
    """Returns the arrays of a checkpoint's state that `abstract` names (`partial`: not all of them), placed by its
    shardings; those without one go onto the first device."""
    import orbax.checkpoint as ocp

    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        sharding = sharding if isinstance(sharding, jax.sharding.Sharding) else first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.tree.map(placed, abstract)
    arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
    request = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments, partial_restore=partial)
    return reader.restore(folder / "state", args=request)


def resume(run: RunState, step: int, shapes: Any) -> Any:
    """Returns the train state of a checkpoint, takes over its progress, and deletes what came after it.

    Args:
      shapes: structure, shapes and shardings of the state (see `shapes_of`).
    """
    state, extra = load(run.checkpoints, step, shapes)
    run.progress = RunProgress(**{field.name: extra[field.name] for field in dataclasses.fields(RunProgress)})
    if run.spikes is not None:
        run.spikes.set_state(extra["guard"])
    if run.progress.done == "finished" and run.progress.step < run.experiment.run.steps:
        run.progress.done = None
    run.rewind(step)
    differing = same_bits_possible(extra["environment"], environment())
    axes = run.mesh_axes()
    moved = [f"{axis} {extra['mesh'][axis]} -> {axes[axis]}" for axis in axes if extra["mesh"][axis] != axes[axis]]
    note = f"; on another mesh ({', '.join(moved)})" if moved else ""
    differing += ["mesh"] if moved else []
    note += f"; not promised to be bit-exact: {', '.join(differing)} changed" if differing else ""
    run.log(f"{run.folder.path}: resumed at step {step}{note}")
    return state


def same_bits_possible(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what differs between two environments in ways that can change bits."""
    names = ("packages", "device_kind", "backend", "devices", "processes", "cpu_count", "xla_flags")
    return [name for name in names if before.get(name) != now.get(name)]
