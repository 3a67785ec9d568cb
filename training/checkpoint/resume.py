"""What an earlier process left in a run's checkpoints: deleted where it is incomplete, verified, set aside where it is
damaged, loaded. Every process of a run calls these functions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chz
import jax

from recollect.configuration import UserError
from recollect.configuration.io import first_line, replace_text
from recollect.configuration.machine import environment
from recollect.configuration.read_json import read_json
from recollect.training.checkpoint.integrity import damage
from recollect.training.checkpoint.orbax_folder import Checkpoints, quiet
from recollect.training.checkpoint.schedule_change import rate_change
from recollect.training.distributed.host import current_host
from recollect.training.run_state import Log, RunProgress, RunState

UNFINISHED = (".orbax-checkpoint-tmp", ".writing")
"""How the names of folders of saves that were cut off end; `.writing` and `.retired` are those of earlier versions."""


def delete_unfinished(checkpoints: Checkpoints, log: Log) -> None:
    """Deletes what a process that died while saving has left, and logs that. To be called before the first save."""
    if current_host().is_main and checkpoints.directory.is_dir():
        for path in sorted(checkpoints.directory.iterdir()):
            if path.suffix in UNFINISHED:
                log(f"checkpoint {path.with_suffix('')} was cut off while it was written: incomplete; deleted")
            if path.suffix in (*UNFINISHED, ".retired"):
                shutil.rmtree(path, ignore_errors=True)
    checkpoints.changed()


def rewind(run: RunState, step: int) -> None:
    """Deletes checkpoints and metrics after `step`, and damaged metrics: a run that goes on from there makes them
    again. At step 0 no checkpoint stays."""
    run.checkpoints.wait()
    if current_host().is_main:
        for later in run.checkpoints.steps():
            if later > step or not step:
                shutil.rmtree(run.checkpoints.directory / str(later), ignore_errors=True)
        _truncate(run.folder.path / "metrics.jsonl", step)
    run.folder.unwritten = []
    run.checkpoints.changed()


def _truncate(metrics: Path, step: int) -> None:
    """Keeps the whole lines of metrics.jsonl up to `step`."""
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="surrogateescape").split("\n") if metrics.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a surrogate is a ValueError too
            if json.loads(line)["step"] <= step and line.encode():
                kept.append(line + "\n")
    if metrics.exists():
        replace_text(metrics, "".join(kept))


def newest_good(checkpoints: Checkpoints, log: Log = print, before: int | None = None) -> int | None:
    """Returns the newest step (less than `before`, if given) whose files are whole; None: none was ever saved.

    The main process reads the files, for every process. Damaged checkpoints on the way are named and moved to damaged/.

    Raises:
      UserError: there were checkpoints and all are damaged: starting again from step 0 must be the user's choice.
    """
    host, aside = current_host(), checkpoints.directory / "damaged"
    steps = [step for step in checkpoints.steps() if before is None or step < before]
    for step in reversed(steps):
        folder = checkpoints.directory / str(step)
        problem = host.broadcast(damage(folder) if host.is_main else None)
        if problem is None:
            return step
        if host.is_main:
            aside.mkdir(exist_ok=True)
            name = f"{step}-{1 + len(list(aside.glob(f'{step}-*')))}"
            log(f"checkpoint {folder} is damaged: {problem}; set aside as damaged/{name}")
            os.rename(folder, aside / name)
        checkpoints.changed()
    names = sorted(path.name for path in aside.iterdir()) if aside.is_dir() else []
    if names and not checkpoints.steps():
        raise UserError(
            f"every checkpoint of {checkpoints.directory} is damaged ({', '.join(names)}); "
            f"delete {aside} to start again from step 0"
        )
    return None


def load(checkpoints: Checkpoints, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the state of a step, every array placed as `abstract` asks, and `extra`. Files are not verified here:
    see `newest_good`.

    Args:
      abstract: a tree like the state saved, of arrays or ShapeDtypeStructs whose `sharding` says where each goes:
        another mesh, another number of devices or processes than the state was saved from. Without one it goes onto
        the first device.

    Raises:
      UserError: the checkpoint is of another structure, or cannot be read.
    """
    checkpoints.wait()
    folder = checkpoints.directory / str(step)
    return restore(folder, lambda saved: abstract), read_json(folder / "meta.json")["extra"]


def restore(folder: Path, select: Callable[[dict[str, Any]], Any], *, partial: bool = False) -> Any:
    """Returns the arrays of a checkpoint that `select(shapes of what was saved)` names (`partial`: not all of them),
    placed by its shardings; those without one go onto the first device.

    Raises:
      UserError: the checkpoint is of another structure, or cannot be read.
    """
    import orbax.checkpoint as ocp

    quiet()
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        sharding = sharding if isinstance(sharding, jax.sharding.Sharding) else first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            shapes = jax.tree.map(placed, select(dict(reader.metadata(folder / "state").item_metadata.tree)))
            arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
            request = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments, partial_restore=partial)
            return reader.restore(folder / "state", args=request)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise UserError(f"checkpoint {folder} cannot be read: {first_line(error)}") from error


def resume(run: RunState, step: int, shapes: Any) -> Any:
    """Returns the train state of a checkpoint, takes over its progress, and deletes what came after it.

    Args:
      shapes: structure, shapes and shardings of the state (see `shapes_of`).
    """
    state, extra = load(run.checkpoints, step, shapes)
    fields = [field.name for field in dataclasses.fields(RunProgress)]
    run.progress = RunProgress(**{name: extra[name] for name in fields if name in extra})  # fewer in earlier versions
    if run.spikes is not None:
        run.spikes.set_state(extra["guard"])
    if run.progress.done == "finished" and run.progress.step < run.experiment.run.steps:
        run.progress.done = None
    rewind(run, step)
    axes = chz.asdict(run.experiment.run.mesh)
    moved = [f"{axis} {extra['mesh'][axis]} -> {axes[axis]}" for axis in axes if extra["mesh"][axis] != axes[axis]]
    note = f"; on another mesh ({', '.join(moved)})" if moved else ""
    names = ("packages", "device_kind", "backend", "devices", "processes", "cpu_count", "xla_flags")  # can change bits
    differing = [name for name in names if extra["environment"].get(name) != environment()[name]]
    differing += ["mesh"] if moved else []
    note += f"; not promised to be bit-exact: {', '.join(differing)} changed" if differing else ""
    run.log(f"{run.folder.path}: resumed at step {step}{note}")
    before = read_json(run.checkpoints.directory / str(step) / "meta.json")["config"]["run"]["steps"]
    if change := rate_change(run.experiment.optimizer, step, before, run.experiment.run.steps):
        run.log(f"  {change}")
        run.progress.facts = {**run.progress.facts, "extended": {"step": step, "steps_before": before}}
    return state
