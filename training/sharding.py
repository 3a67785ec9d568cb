"""One table from parameters' dimension letters to mesh axes: how parameters, train states and batches are split.

Mesh axes: data (replicas), fsdp (parameters split, gathered for use), tensor (heads, hidden units and the vocabulary),
sequence (tokens). A batch's rows are split over data and fsdp, its tokens over sequence. What operations exchange when
tokens are split: pallas_kernels/sharding.py.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recollect.configuration import UserError
from recollect.models.functional import Params, flatten
from recollect.training.experiment import Mesh

AXES = ("data", "fsdp", "tensor", "sequence")

SPLIT: dict[str, str | None] = {
    "d": "fsdp",
    "h": "tensor",
    "g": "tensor",
    "f": "tensor",
    "z": "tensor",
    "k": None,
    "v": None,
    "w": None,
    "e": None,
    "r": None,  # every device routes for all heads
    "l": None,
}
"""Letter (see layers/modules/linear.py) -> mesh axis. Projections into heads split their outputs over tensor,
projections back their inputs; a word of several letters ("hk") is split by its first."""

SPLIT_BESIDE: dict[str, str] = {"t": "fsdp", "u": "fsdp"}
"""Letters that are split only where another dimension is, over an axis that it leaves free: the taps and hidden units
of a long filter, not a table of positions."""


def make_mesh(config: Mesh) -> jax.sharding.Mesh:
    """Returns the mesh of a run.

    Raises:
      UserError: fewer devices here than it names.
    """
    devices = jax.devices()
    if config.devices > len(devices):
        raise UserError(
            f"run.mesh asks for {config.devices} devices; here there are {len(devices)} ({devices[0].platform})"
        )
    grid = np.array(devices[: config.devices]).reshape([getattr(config, axis) for axis in AXES])
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(dims: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of one parameter, without the axes that do not divide its dimensions. Vectors (gains,
    biases) stay whole, and so do leading dimensions without letters: repeats of a layer, members of a population.

    Raises:
      ValueError: a letter is in neither table.
    """
    letters = [word[0] for word in dims.split()]
    unknown = [letter for letter in letters if letter not in SPLIT | SPLIT_BESIDE]
    if unknown:
        raise ValueError(
            f"a parameter with dimensions {dims!r}: there is no sharding rule for {unknown[0]!r}; "
            "add one to SPLIT in training/sharding.py"
        )
    axes: list[str | None] = [None] * len(shape)
    if len(letters) > 1:
        first = len(shape) - len(letters)
        for table in (SPLIT, SPLIT_BESIDE if any(SPLIT.get(letter) for letter in letters) else {}):
            for dimension, letter in enumerate(letters, first):
                axis = table.get(letter)
                if axis is not None and axis not in axes:  # an axis splits one dimension
                    axes[dimension] = axis
    return PartitionSpec(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True))
    )


def params_sharding(params: Params, dims: Params, mesh: jax.sharding.Mesh) -> Params:
    """Returns a NamedSharding for every parameter; `dims` are their letters, `FunctionalModel.tags("dims")`."""
    return jax.tree.map(
        lambda leaf, letters: NamedSharding(mesh, spec_of(letters, tuple(leaf.shape), mesh)), params, dims
    )


def state_sharding(state: Any, dims: Params, mesh: jax.sharding.Mesh) -> Any:
    """Returns shardings for a whole train state, a tree of arrays or of their shapes: leaves whose path ends in that of
    a parameter in `state["params"]`, and that have its shape, are split like it (moments of any optimizer, whether or
    not it leaves parameters out; running averages); the rest is replicated."""
    shardings = flatten(params_sharding(state["params"], dims, mesh))
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(state["params"]).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def assign(entries: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names: list[str] = []
        for entry in reversed(entries):
            if not isinstance(entry, jax.tree_util.DictKey):
                break
            names.insert(0, str(entry.key))
        paths = (".".join(names[start:]) for start in range(len(names)))
        return next((shardings[path] for path in paths if shapes.get(path) == tuple(leaf.shape)), replicated)

    return jax.tree_util.tree_map_with_path(assign, state)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of arrays (b, t): rows of a batch over data and fsdp, tokens over sequence."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def batch_shardings(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns `batch_sharding` for each array (b, p, ...) of a batch, or of its shapes, without axes that do not divide
    it: a recall task's few labelled positions stay whole."""
    axes = batch_sharding(mesh).spec
    parts = (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"])

    def of(leaf: Any) -> NamedSharding:
        spec = (axis if size % n == 0 else None for axis, size, n in zip(axes, leaf.shape[:2], parts, strict=True))
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of, batch)
