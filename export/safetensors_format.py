"""Exports parameters for other programs: `model.safetensors`, `config.json` and `manifest.json` in one folder.

    model.safetensors  arrays by dotted name ("stack.stages.0.weight"): a JSON header, then raw bytes
    config.json        configuration.to_json: class names and values
    tokenizer.json     of a text model, unless its tokens are bytes
    manifest.json      {"format": 1, "sha256", "bytes", "parameters", "arrays": {name: {"shape", "dtype"}}, "extra"}

Source: the safetensors format, https://github.com/huggingface/safetensors (format section of its README). Nothing here
pickles, and reading never imports or calls what a file names: classes are looked up among the config classes that the
caller has imported.

Easy to get wrong: the library stores the memory of an array as it is laid out, so arrays are made C-contiguous first
(`ascontiguousarray` would turn a scalar into a vector); a name with a '.' would be ambiguous with nesting; a folder
must never be seen half-written, so it is filled under another name and renamed.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from recollect.configuration import Config, UserError, from_json, to_json
from recollect.configuration.io import file_sha256, write_json
from recollect.configuration.read_json import read_json_object
from recollect.export.folder import new_folder

FORMAT = 1
WEIGHTS, CONFIG, MANIFEST, TOKENIZER = "model.safetensors", "config.json", "manifest.json", "tokenizer.json"
FILES = frozenset({WEIGHTS, CONFIG, MANIFEST, TOKENIZER, "user_code.json", "user_code"})
# ml_dtypes' bfloat16 has no numpy kind of its own; its name is what safetensors goes by.
DTYPES = (
    "bool",
    "bfloat16",
    *(f"float{bits}" for bits in (16, 32, 64)),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
)

Params = dict[str, Any]


def export_safetensors(
    params: Params,
    config: Config,
    directory: Path | str,
    *,
    extra: dict[str, Any] | None = None,
    files: dict[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `params` and `config` to `directory`, whole or not at all.

    Args:
      params: nested dicts with text keys, arrays (numpy or jax) at the leaves.
      extra: JSON-ready values for the manifest: the step, the accuracy.
      files: further ones by their path in it: the tokenizer's, the user's code.
      overwrite: replaces an export that is there. A folder with other files in it is never replaced.

    Raises:
      UserError: the folder is not empty, or cannot be written.
      ValueError: params hold no arrays, a name or dtype that cannot be stored, or `extra` is not JSON-ready.
    """
    directory = Path(directory)
    arrays = _flatten(params)
    try:
        extra = json.loads(json.dumps(extra or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra cannot be written as JSON: {error}") from error
    with new_folder(directory, FILES.__contains__, overwrite=overwrite) as folder:
        save_file(arrays, folder / WEIGHTS)
        # safetensors makes the file private to its owner; an export is to be handed on like any other file.
        (folder / WEIGHTS).chmod(0o644)
        for name, content in (files or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        write_json(folder / CONFIG, to_json(config))
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "sha256": file_sha256(folder / WEIGHTS),
                "bytes": (folder / WEIGHTS).stat().st_size,
                "parameters": sum(array.size for array in arrays.values()),
                "arrays": _summary(arrays),
                "extra": extra,
            },
        )


def load_safetensors(directory: Path | str) -> tuple[Params, Config]:
    """Returns what `export_safetensors` wrote: nested dicts of numpy arrays, and the config.

    The config's class must have been imported by the caller; names in the file import nothing.

    Raises:
      UserError: a file is missing, damaged, or does not fit the others (file and reason named); or config.json names an
        unknown class or a value that its class refuses.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    path = directory / WEIGHTS
    config = _config(directory / CONFIG)
    try:
        size = path.stat().st_size
        if size != manifest["bytes"]:
            cut = "it was cut off" if size < manifest["bytes"] else "it was changed"
            raise UserError(f"{path} has {size:,} bytes where {MANIFEST} says {manifest['bytes']:,}: {cut}")
        if file_sha256(path) != manifest["sha256"]:
            raise UserError(f"{path} does not match its digest in {MANIFEST}: it is damaged or was changed")
        arrays = load_file(path)
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a safetensors file that can be read: {error}") from None
    stored, listed = _summary(arrays), manifest["arrays"]
    for name in sorted(stored.keys() | listed.keys()):
        if stored.get(name) != listed.get(name):
            raise UserError(
                f"{path}: {name} is {stored.get(name, 'missing')} where {MANIFEST} says {listed.get(name, 'nothing')}"
            )
    return _nest(arrays, path), config


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """Returns the manifest of an export: "sha256", "bytes", "parameters", "arrays" and the "extra" it was written with.

    Raises:
      UserError: it is missing, broken, or of another format version.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"there is no folder {directory}")
    path = directory / MANIFEST
    manifest = read_json_object(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')!r}; this version of Recollect reads {FORMAT}")
    for name, kind in (("sha256", str), ("bytes", int), ("parameters", int), ("arrays", dict), ("extra", dict)):
        if not isinstance(manifest.get(name), kind):
            raise UserError(f"{path}: {name!r} is {manifest.get(name)!r}, not {kind.__name__}")
    return manifest


def _summary(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: {"shape": list(array.shape), "dtype": array.dtype.name} for name, array in arrays.items()}


def _flatten(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    if not params:
        raise ValueError(f"params hold no arrays at {prefix or 'their root'}")
    for name, value in params.items():
        if not isinstance(name, str) or not name or "." in name or name == "__metadata__":
            raise ValueError(
                f"params: {name!r} under {prefix or 'the root'} cannot be a name: text without '.' is needed"
            )
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict):
            flat |= _flatten(value, path)
        elif (array := np.asarray(value, order="C")).dtype.name in DTYPES:
            flat[path] = array
        else:
            raise ValueError(f"params: {path} has dtype {array.dtype}, which cannot be stored")
    return flat


def _nest(arrays: dict[str, np.ndarray], path: Path) -> Params:
    from flax import traverse_util

    for name in arrays:
        parents = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
        if any(parent in arrays for parent in parents):
            raise UserError(f"{path}: {name} lies inside another array")
    return traverse_util.unflatten_dict(arrays, sep=".")


def _config(path: Path) -> Config:
    data = read_json_object(path)
    try:
        return from_json(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, KeyError, RecursionError) as error:
        # Validators of a class may trip over values of a kind that they never meet otherwise.
        raise UserError(f"{path} cannot be read as a config: {type(error).__name__}: {error}") from None
