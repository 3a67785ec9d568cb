"""linear_recurrence on a backend's kernels: passes.py over a backend's walks, split over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.dispatch import Refusal
from recollect.pallas_kernels.linear_recurrence import DIMENSIONS
from recollect.pallas_kernels.linear_recurrence.chunk_scan import DeltaWalk, JoinedWalk, Solve, SolveTransposed, Walk
from recollect.pallas_kernels.linear_recurrence.column_packing import by_walks_of_columns
from recollect.pallas_kernels.linear_recurrence.kernel_vjp import Walks, by_walks
from recollect.pallas_kernels.linear_recurrence.reduced_precision import reduced
from recollect.pallas_kernels.sharding import over_mesh
from recollect.pallas_kernels.tuning import Sizes, block_sizes


class Backend(Protocol):
    """What tpu.py and gpu.py are."""

    walk: Walk
    delta_walk: DeltaWalk
    solve: Solve
    solve_transposed: SolveTransposed

    def chunk_size(self, decay: str, erase: bool, key_dim: int, value_dim: int, dtype: Any) -> int: ...

    def refuses(self, key_dim: int, value_dim: int, dtype: Any, decay: str, erase: bool) -> Refusal: ...


def on_kernels(
    name: str, backend: Backend, joined: JoinedWalk | None = None
) -> tuple[Callable[..., Any], Callable[..., Refusal]]:
    """Returns the operation on the backend's kernels, and its `refuses`. name: "gpu" or "tpu", for the tuning tables:
    `linear_recurrence.NAME_chunk`. joined: the backend's, if it has one."""
    walks = Walks(backend.walk, backend.delta_walk, backend.solve, backend.solve_transposed, backend.chunk_size, joined)

    def chunk(decay: str, erase: bool, k: int, v: int, dtype: Any) -> int:
        def reckon(**_) -> Sizes:
            return {"chunk": backend.chunk_size(decay, erase, k, v, dtype)}

        return block_sizes(
            f"linear_recurrence.{name}_chunk", reckon, decay=decay, erase=erase, k=k, v=v, dtype=jnp.dtype(dtype).name
        )["chunk"]

    def local(q, k, v, **given) -> tuple[jax.Array, jax.Array | None]:
        columns = given.pop("value_log_decay", None)
        decay, erase = _decay(given["log_decay"], columns), given["erase_read"] is not None
        given["chunk_size"] = given["chunk_size"] or chunk(decay, erase, k.shape[3], v.shape[3], v.dtype)
        if columns is None:
            return by_walks(walks, q, k, v, **given)
        del given["log_decay"], given["erase_read"]  # None: refused, or added to that of columns
        return by_walks_of_columns(walks, q, k, v, value_log_decay=columns, **given)

    def named(
        q,
        k,
        v,
        *,
        log_decay=None,
        value_log_decay=None,
        write_strength=None,
        erase_read=None,
        erase_write=None,
        erase_before_decay=False,
        scale=1.0,
        initial_state=None,
        segment_ids=None,
        initial_segment=None,
        return_state=False,
        chunk_size=None,
    ) -> tuple[jax.Array, jax.Array | None]:
        return reduced(
            local,
            q,
            k,
            v,
            log_decay=log_decay,
            value_log_decay=value_log_decay,
            write_strength=write_strength,
            erase_read=erase_read,
            erase_write=erase_write,
            erase_before_decay=erase_before_decay,
            scale=scale,
            initial_state=initial_state,
            segment_ids=segment_ids,
            initial_segment=initial_segment,
            return_state=return_state,
            chunk_size=chunk_size,
        )

    def refuses(q, k, v, *, log_decay=None, value_log_decay=None, erase_read=None, chunk_size=None, **_) -> Refusal:
        if value_log_decay is not None and erase_read is not None:
            return "its kernels do not erase (erase_read) where columns decay (value_log_decay)"
        if value_log_decay is not None and log_decay is not None and log_decay.ndim == 4:
            return (
                "its kernels decay the state's rows (log_decay per channel) or its columns (value_log_decay), not both"
            )
        decay = _decay(log_decay, value_log_decay)
        call = (decay, erase_read is not None, k.shape[3], v.shape[3], v.dtype)
        if chunk_size not in (None, backend.chunk_size(*call), chunk(*call)):
            return f"its kernels take chunks of {chunk(*call)} tokens here; chunk_size is {chunk_size}"
        return backend.refuses(k.shape[3], v.shape[3], v.dtype, decay, erase_read is not None)

    return over_mesh(named, DIMENSIONS, ("b t h v", "b h k v")), refuses


def _decay(log_decay, value_log_decay) -> str:
    if value_log_decay is not None:
        return "value"
    return "none" if log_decay is None else "key" if log_decay.ndim == 4 else "head"
