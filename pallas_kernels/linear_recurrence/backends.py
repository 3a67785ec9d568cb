"""linear_recurrence on a backend's kernels: any call, rewritten for chunk scans and split over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.dispatch import Refusal
from recollect.pallas_kernels.linear_recurrence import column_decay_vjp, kernel_vjp
from recollect.pallas_kernels.linear_recurrence.canonical import run_canonical
from recollect.pallas_kernels.linear_recurrence.chunk_scan import ScanKernels
from recollect.pallas_kernels.linear_recurrence.recurrence import DIMENSIONS, ONE_STATE, Decay, Recurrence
from recollect.pallas_kernels.sharding import over_mesh
from recollect.pallas_kernels.tuning import Sizes, block_sizes


def on_kernels(name: str, kernels: ScanKernels) -> tuple[Callable[..., Any], Callable[..., Refusal]]:
    """Returns the operation on these kernels, and its `refuses`. name: "gpu" or "tpu", for the tuning tables:
    `linear_recurrence.NAME_chunk`."""

    def chunk(decay: Decay, erase: bool, k: int, v: int, dtype: Any) -> int:
        def default(**_) -> Sizes:
            return {"chunk": kernels.chunk_size(decay, erase, k, v, dtype)}

        return block_sizes(
            f"linear_recurrence.{name}_chunk", default, decay=decay, erase=erase, k=k, v=v, dtype=jnp.dtype(dtype).name
        )["chunk"]

    def recurrence(
        inputs: Recurrence, *, return_state: bool = False, chunk_size: int | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        def run(inputs: Recurrence) -> tuple[jax.Array, jax.Array | None]:
            scans = column_decay_vjp if inputs.decay == "value" else kernel_vjp
            size = chunk_size or chunk(*_heads(inputs))
            return scans.recurrence_by_scans(kernels, inputs, return_state=return_state, chunk_size=size)

        return run_canonical(run, inputs)

    def refuses(inputs: Recurrence, *, chunk_size: int | None = None, **_) -> Refusal:
        if inputs.by_document:
            return ONE_STATE
        heads = decay, erase, key_dim, value_dim, dtype = _heads(inputs)
        if decay == "value" and erase:
            return "its kernels do not erase (erase_read) where columns decay (value_log_decay)"
        if decay == "value" and inputs.log_decay is not None and inputs.log_decay.ndim == 4:
            return "its kernels decay a state's rows (log_decay per channel) or its columns (value_log_decay), not both"
        if chunk_size not in (None, kernels.chunk_size(*heads), chunk(*heads)):
            return f"its kernels take chunks of {chunk(*heads)} tokens here; chunk_size is {chunk_size}"
        return kernels.refuses(key_dim, value_dim, dtype, decay, erase)

    return over_mesh(recurrence, {"inputs": DIMENSIONS}, ("b t h v", "b h k v")), refuses


def _heads(inputs: Recurrence) -> tuple[Decay, bool, int, int, Any]:
    """What a chunk size is chosen by."""
    return inputs.decay, inputs.erase_read is not None, inputs.k.shape[3], inputs.v.shape[3], inputs.v.dtype
