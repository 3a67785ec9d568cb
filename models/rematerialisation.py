"""What a layer's backward pass recomputes instead of keeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

Remat = Literal["none", "dots", "full"]
KERNELS = ("pallas_call", "custom_vmap_call")
"""Primitives of Pallas kernels; those for GPUs are called inside a rule of how they are vmapped."""


def rematerialised(run: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Returns `run`, whose backward pass recomputes everything ("full"), or all but products with parameters and the
    results of kernels ("dots")."""
    return jax.checkpoint(run, policy=_keeps_products_and_kernels if remat == "dots" else None)


def _keeps_products_and_kernels(primitive: Any, *args: Any, **params: Any) -> bool:
    """Returns what the policy "dots" keeps: results of matrix products with parameters, and of kernels, Pallas' and
    cuDNN's. A kernel's results are as small as its inputs, and recomputing them costs as much as the first time."""
    kernel = primitive.name in KERNELS or primitive.name.startswith("dot_product_attention_fwd")
    return kernel or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
