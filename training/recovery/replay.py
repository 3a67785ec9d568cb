"""Replay of a step that was not finite, from a folder that keeps it.

The folder holds config.json, params.npz, batch.npz and failure.json (the step, and its diagnosis when it was written).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np

from recollect.configuration import UserError, to_json
from recollect.configuration.io import first_line, write_json
from recollect.configuration.read_json import read_json
from recollect.data.batch import Batch
from recollect.models.functional import Params, flatten, nest
from recollect.training.experiment import Experiment, Mesh
from recollect.training.recovery.first_nonfinite import Diagnosis, diagnose
from recollect.training.saved_experiment import experiment_from_json
from recollect.training.step import Program, program_for

FIELDS = ("tokens", "targets", "target_positions", "weights", "segments")


def save_failure(
    folder: Path,
    experiment: Experiment,
    params: Params,
    batch: Batch,
    step: int,
    diagnosis: Diagnosis | dict[str, Any] | None = None,
) -> None:
    """Writes what reproduces a step that is not finite.

    Under several processes all call it (arrays are gathered), and the first one writes.

    Args:
      params: those that the step was taken from.
      batch: the whole batch of that step.
      diagnosis: what `diagnose` returns for it; None makes it here, on the devices that hold the parameters.

    Raises:
      UserError: the folder cannot be written.
    """
    if diagnosis is None:
        diagnosis = diagnose_step(program_for(experiment), params, batch, step)
    found = diagnosis.to_json() if isinstance(diagnosis, Diagnosis) else diagnosis
    values = {name: _host(leaf) for name, leaf in flatten(params).items()}
    fields = {name: _host(getattr(batch, name)) for name in FIELDS if getattr(batch, name) is not None}
    if jax.process_index():
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", to_json(experiment))
        for name, arrays in (("params", values), ("batch", fields)):
            np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub takes the dict for an option
        # Last: a folder with it is whole.
        write_json(folder / "failure.json", {"step": step, "found": found})
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def diagnose_step(program: Program, params: Params, batch: Batch, step: int) -> Diagnosis:
    """Returns `diagnose` with the loss, dropout, pieces, precision and mesh of a program's step."""
    experiment = program.experiment
    key = program.dropout_key(jnp.uint32(experiment.run.seed), step)
    with program.context():
        return diagnose(program.model, params, batch, key, loss=experiment.loss, pieces=experiment.run.accumulate)


def replay(path: Path, log: Callable[[str], None] = print) -> bool:
    """Runs a kept step again, on one device, and logs what breaks first; returns whether it is not finite here either.

    Raises:
      UserError: the folder is not one that `save_failure` wrote, or is damaged.
    """
    experiment, params, batch, failure = load_failure(path)
    program = _program(experiment)
    rows, length = batch.tokens.shape
    log(
        f"step {failure['step']:,} of {experiment.name}, batch of {rows} x {length} tokens; "
        f"loss then: {failure['found']['loss']:.6g}"
    )
    diagnosis = diagnose_step(program, params, batch, failure["step"])
    widest = max(map(len, diagnosis.largest))
    for name, largest in diagnosis.largest.items():
        note = f"   {diagnosis.broken[name]:,} not finite" if diagnosis.broken[name] else ""
        log(f"  {name:{widest}}  largest {largest:10.4g}{note}")
    if diagnosis.finite:
        log(f"not reproduced on {jax.devices()[0].device_kind}: {diagnosis.sentence()}, loss {diagnosis.loss:.6g}")
        return False
    log(f"reproduced: {diagnosis.sentence()}")
    return True


def load_failure(path: Path) -> tuple[Experiment, Params, Batch, dict[str, Any]]:
    """Returns config, parameters (numpy), batch (numpy) and failure.json of a folder that `save_failure` wrote.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if not (path / "failure.json").exists():
        raise UserError(
            f"{path} holds no failure.json: not a folder of a failed step, "
            "as a run that stops with steps that are not finite leaves it"
        )
    experiment = experiment_from_json(read_json(path / "config.json"), f"{path}/config.json")
    flat, fields = _arrays(path / "params.npz"), _arrays(path / "batch.npz")
    missing = sorted({"tokens", "targets", "weights"} - fields.keys())
    if missing:
        raise UserError(f"{path}/batch.npz lacks {missing[0]}")
    batch = Batch(**{name: fields.get(name) for name in FIELDS})  # type: ignore[arg-type]
    expected = flatten(_program(experiment).model.abstract_params())
    for name in sorted(expected.keys() | flat.keys()):
        if name not in flat or name not in expected or flat[name].shape != expected[name].shape:
            raise UserError(f"{path}/params.npz does not fit its config.json: {name}")
    # The order of the parameters is the model's.
    return (
        experiment,
        nest({tuple(name.split(".")): flat[name] for name in expected}),
        batch,
        read_json(path / "failure.json"),
    )


def _program(experiment: Experiment) -> Program:
    return program_for(chz.replace(experiment, run=chz.replace(experiment.run, mesh=Mesh())))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _host(leaf: Any) -> np.ndarray:
    """Returns a whole array on the host; one that spans processes is gathered, which all of them must call for."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
