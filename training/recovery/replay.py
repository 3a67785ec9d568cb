"""Replay of a step that was not finite, from a folder that keeps it.

The folder holds config.json, params.npz, batch.npz, data.json (and a text model's tokenizer.json), and failure.json
(the step, and its diagnosis when it was written).
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chz
import jax
import numpy as np

from recollect.configuration import UserError, to_json
from recollect.configuration.io import first_line, write_json
from recollect.configuration.read_json import read_json
from recollect.data.batch import Batch
from recollect.models.functional import Params, flatten, nest
from recollect.training.checkpoint.saved_data import read_data, with_tokenizer_of, write_data
from recollect.training.distributed.host import current_host
from recollect.training.experiment import Experiment, Mesh
from recollect.training.recovery.first_nonfinite import Diagnosis, diagnose
from recollect.training.saved_experiment import experiment_from_json
from recollect.training.step import program_for


def save_failure(folder: Path, experiment: Experiment, params: Params, batch: Batch, step: int) -> Diagnosis:
    """Writes what reproduces a step that is not finite; returns what `diagnose`, which takes the same arguments, found.

    Under several processes all call it (arrays are gathered), and the first one writes.

    Raises:
      UserError: the folder cannot be written.
    """
    diagnosis = diagnose(experiment, params, batch, step)
    arrays = {
        "params": {name: _host(leaf) for name, leaf in flatten(params).items()},
        "batch": {name: _host(leaf) for name, leaf in flatten(vars(batch)).items() if leaf is not None},
    }
    if not current_host().is_main:
        return diagnosis
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", to_json(experiment))
        for name, named in arrays.items():
            np.savez(folder / f"{name}.npz", **named)  # type: ignore[arg-type]  # numpy's stub takes the dict for an option
        write_data(folder, experiment.data)
        # Last: a folder with it is whole.
        write_json(folder / "failure.json", {"step": step, "found": dataclasses.asdict(diagnosis)})
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return diagnosis


def replay(path: Path, log: Callable[[str], None] = print) -> bool:
    """Runs a kept step again, on one device, and logs what breaks first; returns whether it is not finite here either.

    Raises:
      UserError: the folder is not one that `save_failure` wrote, or is damaged.
    """
    experiment, params, batch, failure = load_failure(newest_failure(Path(path)))
    rows, length = batch.tokens.shape
    log(
        f"step {failure['step']:,} of {experiment.name}, batch of {rows} x {length} tokens; "
        f"loss then: {failure['found']['loss']:.6g}"
    )
    diagnosis = diagnose(experiment, params, batch, failure["step"])
    widest = max(map(len, diagnosis.largest))
    for name, largest in diagnosis.largest.items():
        note = f"   {diagnosis.broken[name]:,} not finite" if diagnosis.broken[name] else ""
        log(f"  {name:{widest}}  largest {largest:10.4g}{note}")
    if diagnosis.finite:
        log(f"not reproduced on {jax.devices()[0].device_kind}: {diagnosis.sentence()}, loss {diagnosis.loss:.6g}")
        return False
    log(f"reproduced: {diagnosis.sentence()}")
    return True


def newest_failure(path: Path) -> Path:
    """Returns the folder of the last failed step where `path` is a run's folder that keeps some, else `path`."""
    kept = [file.parent for file in (path / "failures").glob("*/failure.json") if file.parent.name.isdecimal()]
    return max(kept, key=lambda folder: int(folder.name), default=path)


def load_failure(path: Path) -> tuple[Experiment, Params, Batch, dict[str, Any]]:
    """Returns config (on one device), parameters (numpy), batch (numpy) and failure.json of a folder that
    `save_failure` wrote.

    Raises:
      UserError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if not (path / "failure.json").exists():
        raise UserError(
            f"{path} holds no failure.json: not a folder of a failed step, "
            "as a run that stops with steps that are not finite leaves it"
        )
    experiment = experiment_from_json(read_json(path / "config.json"), f"{path}/config.json")
    experiment = chz.replace(experiment, run=chz.replace(experiment.run, mesh=Mesh()))
    data = with_tokenizer_of(read_data(path), experiment.data)  # whose source may be gone
    experiment = chz.replace(experiment, data=data)
    flat, fields = _arrays(path / "params.npz"), _arrays(path / "batch.npz")
    for name in ("targets", "tokens", "weights"):
        if name not in fields:
            raise UserError(f"{path}/batch.npz lacks {name}")
    expected = flatten(program_for(experiment).model.abstract_params())
    for name in sorted(expected.keys() | flat.keys()):
        if name not in flat or name not in expected or flat[name].shape != expected[name].shape:
            raise UserError(f"{path}/params.npz does not fit its config.json: {name}")
    params = nest({tuple(name.split(".")): flat[name] for name in expected})  # in the model's order
    known = nest({tuple(name.split(".")): array for name, array in fields.items()})
    batch = Batch(**{field.name: known.get(field.name) for field in dataclasses.fields(Batch)})  # type: ignore[arg-type]
    return experiment, params, batch, read_json(path / "failure.json")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _host(leaf: Any) -> np.ndarray:
    """Returns a whole array on the host; one that spans processes is gathered, which all of them must call for."""
    spread = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    return np.asarray(current_host().whole(leaf) if spread else leaf)
