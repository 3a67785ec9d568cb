"""Attention whose tokens are split over devices: every device keeps its queries, and gathers all keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from recollect.pallas_kernels import sequence_collectives
from recollect.pallas_kernels.sharding import over_sequence


def over_gathered_keys(
    run: Callable[..., Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array | None,
    segments: jax.Array | None,
    return_lse: bool,
    heads: str = "h",
    **rows: jax.Array | None,
) -> Any:
    """Self-attention, tokens split over the ambient mesh's axis sequence: `run`'s outputs (b, t, h, v), with
    `return_lse` also log-sum-exps (b, t, h).

    Args:
      run: the operation's front door with its settings bound, called with queries' and keys' positions and segments.
      positions, segments: (b, t), or None: one document, counted from 0.
      heads: the letter of heads; not "h" where queries' heads do not go with keys' in order, which then are not split.
      rows: what else queries have, (b, t, h) each; passed on by name.
    """

    def part(q, k, v, positions, segments, rows):
        counted = sequence_collectives.global_positions(*q.shape[:2]) if positions is None else positions
        return run(
            q,
            sequence_collectives.gathered(k),
            sequence_collectives.gathered(v),
            query_positions=counted,
            key_positions=sequence_collectives.gathered(counted),
            query_segments=segments,
            key_segments=None if segments is None else sequence_collectives.gathered(segments),
            **rows,
        )

    r = heads
    letters = {
        "q": f"b t {r} k",
        "k": f"b t {r} k",
        "v": f"b t {r} v",
        "positions": "b t",
        "segments": "b t",
        "rows": f"b t {r}",
    }
    results = (f"b t {r} v", f"b t {r}")
    return over_sequence(part, letters, results if return_lse else results[0])(q, k, v, positions, segments, rows)
