"""What operations ask of the ambient mesh (jax.set_mesh, jax.sharding.use_abstract_mesh) before any array is split."""

from __future__ import annotations

import jax
from jax.sharding import AxisType

SEQUENCE = "sequence"
"""The mesh axis that splits tokens."""


def free_axes() -> dict[str, int]:
    """Returns the sizes of the axes over which the compiler, not a surrounding shard_map, splits arrays; no axis
    without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def is_split() -> bool:
    """Returns whether there is such an axis of more than one device."""
    return any(size > 1 for size in free_axes().values())


def sequence_parts(length: int) -> int:
    """Returns the number of parts that the ambient mesh splits `length` tokens into: 1 without a mesh, inside of a
    shard_map over it, and where its axis sequence does not divide the length."""
    parts = free_axes().get(SEQUENCE, 1)
    return parts if length % parts == 0 else 1
