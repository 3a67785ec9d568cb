"""The visits of all tiles of one side as one list, which a TPU kernel's grid walks.

A grid of tiles x longest count would step idly where counts differ, half of the time under a causal mask; the list has
as many steps as there are
visits. A step is one int32 in scalar memory: the own tile, the other tile, and what is to be done.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.scheduled_attention.block_schedule import EMPTY, FULL, PARTIAL, BlockSchedule, Visits

FIRST, LAST, VISITED, MASKED = 1, 2, 4, 8
"""What a step does: it is the first or the last of its own tile; the other tile is looked at (not so where a tile
has none); by its mask."""
FLAG_BITS, VISITED_BITS, RESIDENT_BITS = 4, 14, 13
MOST_RESIDENT, MOST_VISITED = 2**RESIDENT_BITS, 2**VISITED_BITS


@dataclasses.dataclass(frozen=True)
class VisitList:
    """steps (b' most,) int32, of which for each sequence the first ones count and the others do nothing; all stop at
    `longest`, the greatest number that counts, which may be traced. b', here `sequences`, is as for Visits. masked,
    unmasked: whether there may be visits of either kind."""

    steps: Any
    sequences: int
    most: int
    longest: int | jax.Array
    masked: bool
    unmasked: bool

    def at(self, steps: Any, sequence: Any, step: Any) -> Any:
        """One step, of the array in scalar memory."""
        return steps[(sequence if self.sequences > 1 else 0) * self.most + step]


def resident_tile(step: Any) -> Any:
    """The number of the step's tile of the own side."""
    return step >> (FLAG_BITS + VISITED_BITS)


def visited_tile(step: Any) -> Any:
    """The number of the tile that the step visits."""
    return (step >> FLAG_BITS) & (MOST_VISITED - 1)


def most_steps(visits: Visits) -> int:
    """The most steps that a sequence's walk can have, or has where visits are known."""
    if isinstance(visits.count, np.ndarray):
        return int(np.maximum(visits.count, 1).sum(axis=(1, 2)).max())
    _, heads, tiles, m = visits.index.shape
    # A tile of queries has one key head: all heads together visit no more than one could, and each tile without visits
    # has its one step.
    return tiles * m + heads * tiles if heads > 1 else tiles * m


def visit_list(visits: Visits, others: int) -> VisitList:
    """The list of visits, tile after tile, to `others` tiles of the other side; a tile without visits has one step,
    which only starts and ends it.

    Visits that differ by key head, as gathered queries have, become those of g' x tiles tiles, key head after key head:
    a tile of queries has one key head, so that all heads together take as many visits as one schedule's.

    Raises:
      ValueError: more tiles than a step can name.
    """
    xp = np if isinstance(visits.count, np.ndarray) else jnp
    sequences, heads, tiles, m = visits.index.shape
    most = most_steps(visits)
    tiles = heads * tiles
    for named, bound in ((tiles, MOST_RESIDENT), (others, MOST_VISITED)):
        if named > bound:
            raise ValueError(
                f"scheduled attention: {named} tiles are more than the {bound} that a TPU kernel's step can name"
            )
    count = visits.count.reshape(sequences, tiles)
    each = xp.maximum(count, 1)
    ends = xp.cumsum(each, axis=-1)
    total = ends[..., -1]
    step = xp.arange(most)
    own = xp.minimum(xp.sum(ends[..., None, :] <= step[:, None], axis=-1), tiles - 1)
    place = step - xp.take_along_axis(ends - each, own, axis=-1)
    within = step < total[..., None]
    entry = own * m + xp.minimum(place, m - 1)
    other, partial = (
        xp.take_along_axis(x.reshape(sequences, tiles * m), entry, axis=-1) for x in (visits.index, visits.partial)
    )
    visited = within & (xp.take_along_axis(count, own, axis=-1) > 0)
    last = within & (place == xp.take_along_axis(each, own, axis=-1) - 1)
    flags = FIRST * (within & (place == 0)) + LAST * last + VISITED * visited + MASKED * (visited & (partial == 1))
    steps = (((own << VISITED_BITS) | other) << FLAG_BITS) + flags
    masked = unmasked = True
    if xp is np:
        masked, unmasked = bool((visited & (partial == 1)).any()), bool((visited & (partial == 0)).any())
    longest = int(total.max()) if xp is np else jnp.max(total)
    return VisitList(steps.reshape(-1).astype(xp.int32), sequences, most, longest, masked, unmasked)


def kinds_of(visits: Visits, others: int) -> Any:
    """(b', g', tiles, others) int8: EMPTY, PARTIAL or FULL, as the schedule that made the visits has it."""
    within = np.arange(visits.index.shape[-1]) < visits.count[..., None]
    kinds = np.int8(FULL) - (FULL - PARTIAL) * visits.partial.astype(np.int8)
    sequences, heads, tiles, _ = visits.index.shape
    rows = np.ix_(range(sequences), range(heads), range(tiles))
    at = (*(x[..., None] for x in rows), visits.index)
    if isinstance(visits.index, np.ndarray):
        found = np.full((sequences, heads, tiles, others), EMPTY, np.int8)
        np.maximum.at(found, at, np.where(within, kinds, np.int8(EMPTY)))
        return found
    return jnp.full((sequences, heads, tiles, others), EMPTY, jnp.int8).at[at].max(jnp.where(within, kinds, EMPTY))


def by_groups(visits: Visits, others: int, group: int, transposed: bool) -> Visits:
    """The same visits with `group` neighbouring tiles of keys taken as one: visited where one of them is, by the mask
    unless all are full.

    Args:
      others: tiles of the other side.
      transposed: whether the other side is that of queries. Visits of one key head only.
    """
    kinds = kinds_of(visits, others)[:, 0]
    if transposed:
        kinds = kinds.swapaxes(1, 2)
    xp = np if isinstance(kinds, np.ndarray) else jnp
    # What is added at the end is empty, so that a last group with some of it is never full.
    kinds = xp.pad(kinds, ((0, 0), (0, 0), (0, -kinds.shape[2] % group)), constant_values=EMPTY)
    kinds = kinds.reshape(*kinds.shape[:2], -1, group)
    joined = xp.where(
        (kinds == EMPTY).all(axis=-1), EMPTY, xp.where((kinds == FULL).all(axis=-1), FULL, PARTIAL)
    ).astype(xp.int8)
    schedule = BlockSchedule(joined, (joined != EMPTY).any(axis=0) if xp is np else np.ones(joined.shape[1:], bool))
    return schedule.transposed() if transposed else schedule.visits()
