"""Weights as transformers stores them: one safetensors file, or several and an index, with {"format": "pt"}.

Nothing is unpickled. Headers are read first, so that what does not fit is refused before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recollect.configuration import UserError
from recollect.configuration.io import write_json
from recollect.configuration.read_json import read_json_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F16", "BF16", "F32", "F64")


def write_weights(arrays: Iterable[tuple[str, np.ndarray]], folder: Path, largest: int) -> list[str]:
    """Writes arrays in their order, split into files of at most `largest` bytes each (a larger array has one of its
    own); returns the names of all files."""
    files: list[dict[str, np.ndarray]] = [{}]
    held = 0
    for name, array in arrays:
        if files[-1] and held + array.nbytes > largest:
            files.append({})
            held = 0
        files[-1][name] = array
        held += array.nbytes
    several = len(files) > 1
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" if several else WEIGHTS for n in range(1, len(files) + 1)]
    for name, part in zip(names, files, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors makes it private to its owner
    if not several:
        return names
    sizes = {"total_size": sum(array.nbytes for part in files for array in part.values())}
    places = {array: name for name, part in zip(names, files, strict=True) for array in part}
    write_json(folder / INDEX, {"metadata": sizes, "weight_map": dict(sorted(places.items()))})
    return [*names, INDEX]


class StoredWeights:
    """The tensors of a folder: shapes from the headers, then the arrays.

    Attributes:
      shapes: of every tensor, by name.

    Args:
      renamed: parts of names, and what stands for them in the layout's table.

    Raises:
      UserError: there are none that can be read without running code, or a file is damaged.
    """

    def __init__(self, folder: Path, renamed: Mapping[str, str] = MappingProxyType({})):
        self._files = _files(folder)
        self._renamed = renamed
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, Path] = {}
        for path in self._files:
            for stored, (dtype, shape) in _header(path).items():
                name = self._name(stored)
                if name in self.shapes:
                    raise UserError(f"{path}: {name} is in {self._places[name].name}, too")
                if dtype not in _DTYPES:
                    raise UserError(f"{path}: {name} has dtype {dtype}; weights are {', '.join(_DTYPES)}")
                self.shapes[name], self._places[name] = shape, path

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns every tensor, fp32.

        Raises:
          UserError: a file is damaged.
        """
        arrays: dict[str, np.ndarray] = {}
        for path in self._files:
            try:
                with safe_open(path, framework="numpy") as file:
                    for name in file.keys():  # noqa: SIM118
                        arrays[self._name(name)] = np.asarray(file.get_tensor(name), np.float32)
            except (SafetensorError, OSError, ValueError, TypeError) as error:
                raise UserError(f"{path} is not a safetensors file that can be read: {error}") from None
        return arrays

    def _name(self, stored: str) -> str:
        for old, new in self._renamed.items():
            stored = stored.replace(old, new)
        return stored


def _files(folder: Path) -> list[Path]:
    """Returns the files of weights: the one, or those that the index names, which must lie in the folder."""
    if not (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        what = f"{pickles[0]} is a pickle, which is never loaded; " if pickles else ""
        raise UserError(f"{folder}: {what}there is no {WEIGHTS}")
    places = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{folder / INDEX}: weight_map must say which file holds each tensor")
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX}: {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder / INDEX}: there is no {name}")
    return [folder / name for name in sorted(set(places.values()))]


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of every tensor; the library checks them against the size of the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not a safetensors file that can be read: {error}") from None
