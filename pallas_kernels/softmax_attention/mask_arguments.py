"""Checks of a mask, of the token fields that it reads, of a bias of scores and of factors of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.softmax_attention import is_expression


def check_mask(
    q: jax.Array,
    k: jax.Array,
    mask: Any,
    window: int | None,
    pairs: Mapping[str, jax.Array | None],
    fields: Mapping[str, jax.Array | None],
    query_fields: Mapping[str, Any] | None,
    key_fields: Mapping[str, Any] | None,
) -> None:
    """Checks a mask, array or expression, and fields, against q (b, t, h, k) and k (b, s, g, k).

    Args:
      pairs: what has a number per pair and head, by name.
      fields: positions and segments, as query_NAME and key_NAME.
      query_fields, key_fields: the others.

    Raises:
      ValueError: a shape does not fit, or a window is given besides a mask, or the mask reads a field that is not
        there, or nothing reads one that is.
    """
    b, t, s = q.shape[0], q.shape[1], k.shape[1]
    is_mask_expression = is_expression(mask)
    if mask is not None and window is not None:
        besides = "is given besides a mask, which takes its place: make it part of the mask"
        raise ValueError(f"softmax_attention: window={window} {besides}")
    for name, array in pairs.items():
        if array is not None and (
            array.ndim != 4
            or any(n not in (1, size) for n, size in zip(array.shape[:2], (b, q.shape[2]), strict=True))
            or array.shape[2:] != (t, s)
        ):
            shape = f"{(b, q.shape[2], t, s)}, or 1 for its first two"
            raise ValueError(f"softmax_attention: {name} must be {shape}; got {array.shape}")
    if (
        mask is not None
        and not is_mask_expression
        and (mask.shape not in ((b, t, s), (1, t, s)) or mask.dtype != jnp.bool_)
    ):
        raise ValueError(
            f"softmax_attention: mask must be bool {(b, t, s)} or {(1, t, s)}; got {mask.dtype} {mask.shape}"
        )
    more = [
        (f"{side}_fields[{name!r}]", field, length)
        for side, more_fields, length in (("query", query_fields, t), ("key", key_fields, s))
        for name, field in (more_fields or {}).items()
    ]
    for name, field, length in more:
        if field is not None and field.shape not in ((b, length), (1, length)):
            raise ValueError(f"softmax_attention: {name} must be {(b, length)} or {(1, length)}; got {field.shape}")
    if is_mask_expression:
        for side, more_fields in (("query", query_fields), ("key", key_fields)):
            present = {
                *(more_fields or {}),
                *(["segments"] if fields[f"{side}_segments"] is not None else []),
                *(["positions"] if fields[f"{side}_positions"] is not None or t == s else []),
            }
            missing = sorted(mask.fields - present)
            if missing:
                raise ValueError(
                    f"softmax_attention: the mask reads {missing[0]}, "
                    f"which neither {side}_fields nor another argument gives"
                )
    elif more:
        raise ValueError(f"softmax_attention: {more[0][0]} is given, but no mask expression that would read it")
