"""Masks that differ by head: the heads of each mask are a call of their own, so that each has its own schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.mask_expressions import Mask


def by_head(attend: Callable[..., Any], q, k, v, mask: Mask, pairs: Mapping[str, Any], **call: Any) -> Any:
    """Returns what `attend`, the public function, does with each head's own mask.

    Args:
      pairs: the arguments sinks (h,), bias and dropout (b or 1, h or 1, t, s).
      call: all others.
    """
    h, per_key = q.shape[2], q.shape[2] // k.shape[2]
    heads_of: dict[Mask, list[int]] = {}
    for head in range(h):
        heads_of.setdefault(mask.of_head(head), []).append(head)
    parts = []
    for of_heads, heads in heads_of.items():
        keys = [head // per_key for head in heads]
        shared = sorted(set(keys))
        if keys == [key for key in shared for _ in range(len(heads) // len(shared))]:
            keys = shared  # as many queries of each: they share its keys
        index = np.array(heads)
        of_part = {
            name: x if x is None or (x.ndim == 4 and x.shape[1] == 1) else x[index] if x.ndim == 1 else x[:, index]
            for name, x in pairs.items()
        }
        of_keys = (x[:, :, np.array(keys)] for x in (k, v))
        parts.append(attend(q[:, :, index], *of_keys, mask=of_heads, **of_part, **call))
    back = np.argsort(np.concatenate(list(heads_of.values())))
    if isinstance(parts[0], tuple):
        return tuple(jnp.concatenate(side, axis=2)[:, :, back] for side in zip(*parts, strict=True))
    return jnp.concatenate(parts, axis=2)[:, :, back]
