"""Parameters that a run begins with: another run's, or an export's, by name (`run.initialize`).

    run.initialize=runs/pretrained            # its newest checkpoint; runs/pretrained:500 is that of step 500
    run.initialize=exported/                  # model.safetensors and config.json, of an export or of Hugging Face

Data, schedule, optimizer state and step are the new run's. Low-rank updates of the source are added to its weights, so
the new model may have updates of its own, or none. What differs is refused, unless `run.initialize_mismatch` allows it:
"vocabulary" keeps the rows of the token ids that both have, "any" also leaves parameters that have another shape, or
are not there, as they are drawn afresh, and those that the model lacks unused. Checkpoints of the new run are whole: it
resumes without the source.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

import recollect.export.safetensors_format as safetensors_format
from recollect.configuration import Config, UserError, differences
from recollect.configuration.io import file_sha256, flatten
from recollect.configuration.python_files import USER_FILES
from recollect.configuration.user_paths import path_kind
from recollect.export.huggingface import is_huggingface
from recollect.models.adaptation import merged, nested
from recollect.models.functional import FunctionalModel
from recollect.training.checkpoint.exported import open_export
from recollect.training.checkpoint.load import load_params
from recollect.training.checkpoint.named_run import run_at
from recollect.training.checkpoint.orbax_folder import DIGESTS, Checkpoints
from recollect.training.checkpoint.saved_data import read_data
from recollect.training.experiment import Experiment
from recollect.training.run_state import RunState, run_directory
from recollect.training.saved_experiment import as_experiment
from recollect.training.user_code import run_recorded


@dataclasses.dataclass(frozen=True)
class Start:
    """Parameters to begin with.

    Attributes:
      params: by dotted name, updates merged.
      experiment: that trained them.
      tokenizer: digest of its tokenizer; None of a recall task.
      origin: "path", "step" and "sha256", JSON-ready: of a run, of the file of digests that seals the checkpoint; of a
        Hugging Face folder, of its config.json.
    """

    params: dict[str, np.ndarray]
    experiment: Experiment
    tokenizer: str | None
    origin: dict[str, Any]


def check_sources(experiments: list[Experiment]) -> None:
    """Raises UserError where the parameters that a run would begin with are not there or do not fit; runs that have
    checkpoints do not need them."""
    for experiment in experiments:
        source = experiment.run.initialize
        if source is not None and not Checkpoints(run_directory(experiment) / "checkpoints").steps():
            _fitting(open_start(source), experiment)


def initialized(run: RunState, state: Any) -> Any:
    """Returns a fresh state with the parameters that `run.initialize` names, and records where they are from."""
    source = run.experiment.run.initialize
    start = open_start(source or "")
    values = _fitting(start, run.experiment)

    def put(tree: Any) -> Any:
        flat = {}
        for name, leaf in flatten(tree).items():
            value = values.get(name)
            if value is not None and value.shape != leaf.shape:  # rows of the vocabulary
                whole = np.array(jax.device_get(leaf))
                common = tuple(slice(min(sizes)) for sizes in zip(value.shape, leaf.shape, strict=True))
                whole[common] = value[common]
                value = whole
            flat[name] = leaf if value is None else _placed(value, leaf)
        return nested(flat)

    run.progress.facts = {"initialized_from": start.origin}
    run.folder.write("initialized_from.json", start.origin)
    fresh = [name for name in flatten(state["params"]) if name not in values]
    rest = f"; drawn afresh: {_some(fresh)}" if fresh else ""
    shapes = {name: leaf.shape for name, leaf in flatten(state["params"]).items()}
    kept = [
        f"{min(there, here):,} of {here:,} rows of {name}"
        for name, value in values.items()
        for there, here in zip(value.shape, shapes[name], strict=True)
        if there != here
    ]
    rest = (f"; kept: {_some(kept)}" if kept else "") + rest
    run.log(f"{run.folder.path}: begins with the parameters of {source}, step {start.origin['step']:,}{rest}")
    changed = differences(start.experiment.model, run.experiment.model)
    if shown := [path for path in changed if path.split(".")[0] not in ("lora", "remat", "unroll", "dtype")]:
        run.log(f"  the model is another than it was trained in: {_some(['model.' + path for path in shown])}")
    return {**state, **{name: put(state[name]) for name in ("params", "ema") if name in state}}


def open_start(source: str) -> Start:
    """Returns the parameters that `run.initialize=source` names.

    Raises:
      UserError: there is no such run, export or step, or it is damaged.
    """
    said = f"run.initialize={source}"
    path, step = run_at(source, said)
    kind_of_path = path_kind(path, said)
    kind: Any
    if (path / safetensors_format.MANIFEST).is_file():
        kind, stamp = _read_export, path / safetensors_format.MANIFEST
    elif (path / "checkpoints").is_dir():
        kind, stamp = _read_run, path / "checkpoints"
    elif is_huggingface(path):
        kind, stamp = _read_huggingface, path / "config.json"
    else:
        problem = "is neither a run's folder (checkpoints/) nor an export (manifest.json) nor a Hugging Face folder"
        raise UserError(f"{said}: {path} {problem if kind_of_path else 'is not there; give a run or an export'}")
    try:
        if not USER_FILES:  # as `--with` does, files that the command names take the place of what the run recorded
            run_recorded(path)
        return _cached(kind, path, step, stamp.stat().st_mtime_ns)
    except UserError as error:
        raise UserError(f"{said}: {error}") from error


@functools.lru_cache(maxsize=1)
def _cached(read: Any, path: Path, step: int | None, modified: int) -> Start:
    """Returns what `read` does; the same for all runs of a study that begin with the same parameters."""
    return read(path, step)


def _read_run(path: Path, step: int | None) -> Start:
    params, config, step = load_params(path / "checkpoints", ema=True, step=step)
    folder = path / "checkpoints" / str(step)
    data = read_data(folder)
    digest = data.tokenizer.digest if data.tokenizer else None
    return _start(params, config, data.vocabulary, digest, path, step, file_sha256(folder / DIGESTS))


def _read_export(path: Path, step: None) -> Start:
    params, config = safetensors_format.load_safetensors(path)
    manifest = safetensors_format.read_manifest(path)
    extra = manifest["extra"]
    digest = (extra.get("tokenizer") or {}).get("digest")
    return _start(params, config, extra.get("vocabulary"), digest, path, extra.get("step", 0), manifest["sha256"])


def _read_huggingface(path: Path, step: int | None) -> Start:
    params, experiment, step, data = open_export(path)
    digest = data.tokenizer.digest if data.tokenizer else None
    return _start(params, experiment, data.vocabulary, digest, path, step, file_sha256(path / "config.json"))


def _start(
    params: Any, config: Config, vocabulary: int | None, digest: str | None, path: Path, step: int, sha256: str
) -> Start:
    experiment = as_experiment(config, str(path))
    words = vocabulary or params["embedding"].shape[0]
    flat = {name: np.asarray(leaf) for name, leaf in flatten(merged(params, experiment.model, words)[0]).items()}
    return Start(flat, experiment, digest, {"path": str(path.absolute()), "step": step, "sha256": sha256})


def _fitting(start: Start, experiment: Experiment) -> dict[str, np.ndarray]:
    """Returns those of the parameters that the new run begins with.

    Raises:
      UserError: parameters or tokens differ in a way that `run.initialize_mismatch` does not allow.
    """
    model = FunctionalModel(experiment.model, experiment.data.vocabulary)
    shapes = {name: leaf.shape for name, leaf in flatten(model.abstract_params()).items()}
    dims = flatten(model.tags("dims"))
    allowed = experiment.run.initialize_mismatch
    said = f"run.initialize={experiment.run.initialize}"
    values: dict[str, np.ndarray] = {}
    words, others = [], []
    for name, shape in shapes.items():
        value = start.params.get(name)
        if value is None:
            others += [] if name.startswith("lora.") else [f"{name} is not there"]
        elif value.shape == shape:
            values[name] = value
        elif _differs_in_vocabulary(value.shape, shape, dims[name]):
            values[name] = value
            words.append(f"{name} {value.shape} there, {shape} here")
        else:
            others.append(f"{name} is {value.shape} there, {shape} here")
    others += [f"{name} is not in this model" for name in start.params if name not in shapes]
    if others and allowed != "any":
        how = "run.initialize_mismatch=any takes what fits and draws the rest afresh"
        raise UserError(f"{said}: its parameters do not fit this model: {_some(others)}; {how}")
    if words and allowed == "refuse":
        how = "run.initialize_mismatch=vocabulary keeps the rows of token ids that both have"
        raise UserError(f"{said}: it has another vocabulary: {_some(words)}; {how}")
    tokenizer = experiment.data.open_tokenizer()
    if start.tokenizer and tokenizer and tokenizer.digest != start.tokenizer and allowed == "refuse":
        how = "prepare the data with its tokenizer, or run.initialize_mismatch=vocabulary keeps rows by token id"
        raise UserError(f"{said}: it was trained with another tokenizer than {tokenizer.name!r}; {how}")
    return values


def _differs_in_vocabulary(there: tuple[int, ...], here: tuple[int, ...], dims: str) -> bool:
    """Returns whether two shapes of a parameter differ in the number of token ids alone."""
    letters = dims.split()
    first = len(here) - len(letters)
    return len(there) == len(here) and all(
        a == b or (index >= first and letters[index - first] == "z")
        for index, (a, b) in enumerate(zip(there, here, strict=True))
    )


def _placed(value: np.ndarray, leaf: Any) -> jax.Array:
    """Returns an array on the devices of `leaf`, in its dtype."""
    value = value.astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])


def _some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
