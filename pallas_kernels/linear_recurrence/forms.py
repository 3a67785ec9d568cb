"""The front door's implementations on kernels: passes.py over a backend's walks, split over a mesh, long sequences cut in pieces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax

from pallas_kernels.dispatch import Implementation, Refusal
from pallas_kernels.linear_recurrence import gpu, tpu
from pallas_kernels.linear_recurrence.passes import Walks, by_walks
from pallas_kernels.linear_recurrence.splitting import in_pieces
from pallas_kernels.linear_recurrence.walks import DeltaWalk, Walk
from pallas_kernels.sharding import over_mesh

SHORTEST_PIECE = 1024
"""Tokens: below, a piece's own work does not hide what combining the pieces costs."""
HOPPER_CORES = 132

DIMENSIONS = {
    "q": "b t h k",
    "k": "b t h k",
    "v": "b t h v",
    "log_decay": ("h", "b t h", "b t h k"),
    "write_strength": ("b t h", "b t h v"),
    "erase_read": "b t h k",
    "initial_state": "b h k v",
    "segment_ids": "b t",
    "initial_segment": "b",
}


class Backend(Protocol):
    """What tpu.py and gpu.py are."""

    walk: Walk
    delta_walk: DeltaWalk

    def chunk_size(self, decay: str, erase: bool, key_dim: int, value_dim: int, dtype: Any) -> int: ...

    def refuses(self, key_dim: int, value_dim: int, dtype: Any, decay: str, erase: bool) -> Refusal: ...


def kernel_form(backend: Backend, pieces: Callable[[int, int, int, int], int]) -> Implementation:
    """The implementation and what it refuses; pieces(b, t, h, value_dim) is into how many pieces of time a call is cut."""
    walks = Walks(backend.walk, backend.delta_walk, backend.chunk_size)

    def local(q, k, v, **given) -> tuple[jax.Array, jax.Array | None]:
        run = functools.partial(by_walks, walks)
        b, t, h, value_dim = v.shape
        count = pieces(b, t, h, value_dim)
        if given["erase_read"] is not None and count > 1:
            # Pieces carry as many more columns as a key has channels.
            decay = _decay(given["log_decay"])
            if backend.refuses(k.shape[3], value_dim + k.shape[3], v.dtype, decay, True):
                count = 1
        return run(q, k, v, **given) if count == 1 else in_pieces(run, count, q, k, v, **given)

    def named(
        q,
        k,
        v,
        *,
        log_decay=None,
        write_strength=None,
        erase_read=None,
        erase_write=None,
        scale=1.0,
        initial_state=None,
        segment_ids=None,
        initial_segment=None,
        return_state=False,
        chunk_size=None,
    ) -> tuple[jax.Array, jax.Array | None]:
        return local(
            q,
            k,
            v,
            log_decay=log_decay,
            write_strength=write_strength,
            erase_read=erase_read,
            scale=scale,
            initial_state=initial_state,
            segment_ids=segment_ids,
            initial_segment=initial_segment,
            return_state=return_state,
            chunk_size=chunk_size,
        )

    def refuses(q, k, v, *, log_decay=None, erase_read=None, erase_write=None, chunk_size=None, **_) -> Refusal:
        if erase_write is not None:
            return "its kernels erase with k itself, not with a key apart (erase_write)"
        decay = _decay(log_decay)
        call = (decay, erase_read is not None, k.shape[3], v.shape[3], v.dtype)
        own = backend.chunk_size(*call)
        if chunk_size not in (None, own):
            return f"its kernels take chunks of {own} tokens here; chunk_size is {chunk_size}"
        return backend.refuses(k.shape[3], v.shape[3], v.dtype, decay, erase_read is not None)

    return over_mesh(named, DIMENSIONS, ("b t h v", "b h k v")), refuses


def _decay(log_decay) -> str:
    return "none" if log_decay is None else "key" if log_decay.ndim == 4 else "head"


def one_piece(b: int, t: int, h: int, value_dim: int) -> int:
    """For devices with one or two cores, which any call fills."""
    return 1


def pieces_to_fill_hopper(b: int, t: int, h: int, value_dim: int) -> int:
    """As many as the cores can take at once: a row and head's 64 columns keep one busy."""
    programs = b * h * -(-value_dim // 64)
    return max(1, min(HOPPER_CORES // programs, t // SHORTEST_PIECE))


GPU = kernel_form(gpu, pieces_to_fill_hopper)  # type: ignore[arg-type]
TPU = kernel_form(tpu, one_piece)  # type: ignore[arg-type]
