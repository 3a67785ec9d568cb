"""One table from parameter paths to PartitionSpecs. Layers carry no sharding annotations.

Mesh axes: data (replicas), fsdp (parameters split, gathered for use), tensor (heads, MLP columns and words), sequence
(tokens). A batch's rows are
split over data and fsdp, its tokens over sequence. What operations exchange when tokens are split is theirs to know:
pallas_kernels/sharding.py.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recollect.configuration import UserError
from recollect.models.functional import Params, flatten
from recollect.training.experiment import Mesh

AXES = ("data", "fsdp", "tensor", "sequence")

# First match wins. Specs count from the last dimension, so that a leading axis of repeated layers stays whole.
# Projections into heads split their outputs over tensor, projections back split their inputs; what is as wide as the
# heads or the MLP follows them.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"^embedding$", ("tensor", "fsdp")),  # by words, as the head's columns are
    (r"(^|\.)table$", (None, "fsdp")),
    (r"_router\.kernel$", ("fsdp", None)),  # every device routes for all heads
    (r"_features\.kernel$", ("tensor", None, None)),  # a matrix a head
    (r"\.filter\.(output|taps|down\.kernel)$", ("fsdp", "tensor")),  # a long filter's channels
    (r"\.filter\.", ()),
    (r"\.convolution\.taps$", (None, "tensor")),
    (r"\.(output|down)\.kernel$", ("tensor", "fsdp")),
    (r"\.kernel$", ("fsdp", "tensor")),
    (r"", ()),  # norms, biases, and other vectors
)


def make_mesh(config: Mesh) -> jax.sharding.Mesh:
    """The mesh of a run.

    Raises:
      UserError: fewer devices here than it names.
    """
    devices = jax.devices()
    if config.devices > len(devices):
        raise UserError(
            f"run.mesh asks for {config.devices} devices; here there are {len(devices)} ({devices[0].platform})"
        )
    shape = tuple(getattr(config, axis) for axis in AXES)
    return jax.sharding.Mesh(
        np.array(devices[: config.devices]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def spec_of(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """The PartitionSpec of one array: the table's, less the axes that do not divide its dimensions."""
    tail = next(spec for pattern, spec in RULES if re.search(pattern, path))
    if len(tail) > len(shape):
        tail = ()
    full = (None,) * (len(shape) - len(tail)) + tuple(tail)
    return PartitionSpec(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(full, shape, strict=True))
    )


def params_sharding(params: Params, mesh: jax.sharding.Mesh) -> Params:
    """A NamedSharding for every parameter."""
    flat = flatten(params)
    specs = {path: NamedSharding(mesh, spec_of(path, tuple(leaf.shape), mesh)) for path, leaf in flat.items()}
    structure = jax.tree.structure(params)
    return jax.tree.unflatten(
        structure, [specs[_path(path)] for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    )


def state_sharding(state: Any, params: Params, mesh: jax.sharding.Mesh) -> Any:
    """Shardings for a whole train state: what has a parameter's path at the end of its own, and its shape, is split
    like it (moments of any optimizer, with parameters left out or not; running averages); the rest is replicated. Trees
    of arrays or of their shapes."""
    shardings = flatten(params_sharding(params, mesh))
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
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
    """Rows of a batch over data and fsdp, tokens over sequence: of arrays (b, t)."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def batch_shardings(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """`batch_sharding` for each array (b, p) of a batch, or of its shapes, without what does not divide it: a recall
    task's few labelled positions stay whole."""
    rows = batch_sharding(mesh).spec

    def of(leaf: Any) -> NamedSharding:
        sizes = (math.prod(mesh.shape[axis] for axis in ("data", "fsdp")), mesh.shape["sequence"])
        return NamedSharding(
            mesh,
            PartitionSpec(
                *(
                    axes if size % parts == 0 else None
                    for axes, size, parts in zip(rows, leaf.shape, sizes, strict=True)
                )
            ),
        )

    return jax.tree.map(of, batch)


def _path(entries: tuple[Any, ...]) -> str:
    return ".".join(str(entry.key) for entry in entries)
