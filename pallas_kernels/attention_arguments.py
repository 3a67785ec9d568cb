"""Arguments that the attention operations share: fields of queries and keys by name, query_NAME and key_NAME, and the
checks of shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


def with_key_fields(q: jax.Array, k: jax.Array, **fields: Any) -> dict[str, Any]:
    """Returns the fields; where there are as many keys as queries, a key field that is None is the query's."""
    same_length = q.ndim == k.ndim == 4 and q.shape[1] == k.shape[1]
    return {
        name: fields[f"query_{name.removeprefix('key_')}"]
        if same_length and field is None and name.startswith("key_")
        else field
        for name, field in fields.items()
    }


def is_self_attention(q: jax.Array, k: jax.Array, fields: Mapping[str, Any]) -> bool:
    """Returns whether keys are the queries' tokens: as many, and each key field is the very array of the query's."""
    pairs = [(fields[f"key_{name[6:]}"], field) for name, field in fields.items() if name.startswith("query_")]
    return q.shape[1] == k.shape[1] and all(of_keys is of_queries for of_keys, of_queries in pairs)


def check_attention(
    operation: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fields: Mapping[str, jax.Array | None],
    *,
    grouped: bool = True,
) -> None:
    """Checks the shapes of q (b, t, h, k), k (b, s, g, k), v (b, s, g, v), positions and segments (b, t) and (b, s).

    Args:
      operation: the name that messages begin with.
      grouped: whether h must be a multiple of g.

    Raises:
      ValueError: a shape does not fit, or segments of one side only are given.
    """
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"{operation}: {name} must have four dimensions; got {array.shape}")
    (b, t, h, dim), (s, groups) = q.shape, k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != dim:
        raise ValueError(f"{operation}: k must be ({b}, s, g, {dim}) to fit q {q.shape}; got {k.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{operation}: v must be {k.shape[:3]} + (v,); got {v.shape}")
    if grouped and (groups < 1 or h % groups):
        raise ValueError(f"{operation}: q has {h} heads, which is no multiple of the {groups} heads of k")
    for name, field in fields.items():
        shape = (b, t if name.startswith("query") else s)
        if field is not None and field.shape != shape:
            raise ValueError(f"{operation}: {name} must be {shape}; got {field.shape}")
    if (fields["query_segments"] is None) != (fields["key_segments"] is None):
        raise ValueError(f"{operation}: query_segments and key_segments must be given together")


def is_expression(mask: Any) -> bool:
    """Returns whether a mask is an expression over token fields, not an array of pairs."""
    return hasattr(mask, "allows")
