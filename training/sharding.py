"""One table from parameter paths to PartitionSpecs. Layers carry no sharding annotations.

Mesh axes: data (replicas), fsdp (parameters split, gathered for use), tensor (heads and MLP columns), sequence.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configuration import UserError
from models.functional import Params, flatten
from training.experiment import Mesh

AXES = ("data", "fsdp", "tensor", "sequence")

# First match wins. Specs count from the last dimension, so that a leading axis of repeated layers stays whole. Projections into
# heads split their outputs over tensor, projections back split their inputs.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|\.)(embedding|table)$", (None, "fsdp")),
    (r"\.(output|down)\.kernel$", ("tensor", "fsdp")),
    (r"\.kernel$", ("fsdp", "tensor")),
    (r"", ()),
)


def make_mesh(config: Mesh) -> jax.sharding.Mesh:
    """The mesh of a run.

    Raises:
      UserError: fewer devices here than it names.
    """
    devices = jax.devices()
    if config.devices > len(devices):
        raise UserError(f"run.mesh asks for {config.devices} devices; here there are {len(devices)} ({devices[0].platform})")
    shape = tuple(getattr(config, axis) for axis in AXES)
    return jax.sharding.Mesh(np.array(devices[: config.devices]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """The PartitionSpec of one array: the table's, less the axes that do not divide its dimensions."""
    tail = next(spec for pattern, spec in RULES if re.search(pattern, path))
    if len(tail) > len(shape):
        tail = ()
    full = (None,) * (len(shape) - len(tail)) + tuple(tail)
    return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(full, shape, strict=True)))


def params_sharding(params: Params, mesh: jax.sharding.Mesh) -> Params:
    """A NamedSharding for every parameter."""
    flat = flatten(params)
    specs = {path: NamedSharding(mesh, spec_of(path, tuple(leaf.shape), mesh)) for path, leaf in flat.items()}
    structure = jax.tree.structure(params)
    return jax.tree.unflatten(structure, [specs[_path(path)] for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]])


def state_sharding(state: Any, params: Params, mesh: jax.sharding.Mesh) -> Any:
    """Shardings for a whole train state: every subtree shaped like the parameters is split like them, the rest is replicated."""
    shardings = params_sharding(params, mesh)
    structure: Any = jax.tree.structure(params)
    replicated = NamedSharding(mesh, PartitionSpec())

    def like_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    def assign(node: Any) -> Any:
        return shardings if like_params(node) else jax.tree.map(lambda _: replicated, node)

    return jax.tree.map(assign, state, is_leaf=like_params)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def _path(entries: tuple[Any, ...]) -> str:
    return ".".join(str(entry.key) for entry in entries)
