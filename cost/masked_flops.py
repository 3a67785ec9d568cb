"""What masks leave of the work of softmax attention: pairs of tokens, tiles of their block schedules, and the FLOPs of
a forward pass that visits those tiles only.

Query and output maps and the MLP are counted at tokens that see a key, key and value maps at tokens that are seen:
percepts that are no queries need neither of the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.layers.context import Context
from recollect.layers.mixers.attention import SoftmaxConfig
from recollect.layers.mixers.planned_attention import PlannedAttention
from recollect.layers.mixers.position_invariant_attention import PositionInvariantAttention
from recollect.layers.modules import position_plans
from recollect.layers.packing import token_positions
from recollect.models.functional import FunctionalModel, flatten
from recollect.pallas_kernels.masks import PERCEPT, Causal, Mask
from recollect.pallas_kernels.scheduled_attention.block_schedule import (
    EMPTY,
    FULL,
    block_schedule,
    padded_fields,
    pairs_allowed,
)
from recollect.pallas_kernels.softmax_attention.scheduled_xla import TILE
from recollect.training.experiment import Experiment
from recollect.training.loss import context_of


@dataclasses.dataclass(frozen=True)
class MaskWork:
    """Counts of one sequence under a mask.

    Attributes:
      allowed: pairs that the mask allows.
      visited: pairs of the tiles that are not empty.
      tiles, visited_tiles, full_tiles: all of them, those that are not empty, and those that need no mask.
      queries, keys: tokens that see one, and tokens that are seen.
    """

    allowed: int
    visited: int
    tiles: int
    visited_tiles: int
    full_tiles: int
    queries: int
    keys: int


def mask_work(mask: Mask, fields: dict[str, Any], length: int, tile: int = TILE) -> MaskWork:
    """Returns the counts of a mask over one sequence, from the fields (1, t) that it reads, in square tiles."""
    read = {name: np.asarray(fields[name]) for name in mask.fields}
    allowed = np.broadcast_to(np.asarray(pairs_allowed(mask, read, read)), (1, length, length))[0]
    tiles = -(-length // tile)
    query, key = padded_fields(read, read, (length, length), (tiles * tile, tiles * tile))
    kinds = np.asarray(block_schedule(mask, query, key, (tiles * tile, tiles * tile), (tile, tile)).kinds)[0]
    sizes = np.minimum(tile, length - tile * np.arange(tiles))
    return MaskWork(
        allowed=int(allowed.sum()),
        visited=int(sizes @ (kinds != EMPTY) @ sizes),
        tiles=kinds.size,
        visited_tiles=int((kinds != EMPTY).sum()),
        full_tiles=int((kinds == FULL).sum()),
        queries=int(allowed.any(axis=1).sum()),
        keys=int(allowed.any(axis=0).sum()),
    )


def describe_masks(experiment: Experiment) -> Iterator[str]:
    """Yields what masks leave of each softmax layer's work on one training example, and the forward FLOPs of that
    example; nothing for a model with other mixers."""
    config, data = experiment.model, experiment.data
    if not all(isinstance(mixer, SoftmaxConfig) for mixer in config.mixers):
        return
    batch = jax.jit(lambda: data.train_batch(0, 0, batch_size=1))()  # type: ignore[attr-defined]
    context, length = context_of(batch), batch.tokens.shape[1]
    percepts = 0 if context.token_types is None else int((context.token_types == PERCEPT).sum())
    params = FunctionalModel(config, data.vocabulary).abstract_params()
    sizes = {path: int(leaf.size) for path, leaf in flatten(params).items()}
    products = percepts * sum(
        size for path, size in sizes.items() if path.startswith("projector") and path.endswith("kernel")
    )
    products += batch.targets.shape[1] * config.width * data.vocabulary
    for number, stage in enumerate(config.stages):
        for place, mixer in enumerate(stage.pattern):
            assert isinstance(mixer, SoftmaxConfig)
            work = mask_work(mixer.mask() or Causal(), _fields(mixer, context, length), length)
            yield (
                f"{type(mixer).__name__}: {work.allowed:,} of {length**2:,} pairs allowed; {work.visited_tiles:,} of "
                f"{work.tiles:,} tiles of {TILE} visited, {work.full_tiles:,} of them without a mask"
            )
            rows = {"query": work.queries, "output": work.queries, "key": work.keys, "value": work.keys}
            rows |= {
                "up": work.queries,
                "down": work.queries,
                "gate": work.queries,
                "inner": percepts,
                "outer": percepts,
            }
            start = f"stack.stages.{number}.{place}."
            kernels = {path: size for path, size in sizes.items() if path.startswith(start) and path.endswith("kernel")}
            products += sum(rows.get(path.split(".")[-2], length) * size for path, size in kernels.items())
            # Dense: scores for each segment and for what is in none, scores without positions, and values.
            pairs = 2 * work.visited
            if isinstance(mixer, PositionInvariantAttention):
                pairs = (mixer.segments + 3) * length**2
            products += stage.repeats * pairs * mixer.heads * mixer.head_width(config.width)
    yield f"forward FLOPs of an example of {length:,} tokens by these schedules: {2 * products:,}"


def _fields(mixer: SoftmaxConfig, context: Context, length: int) -> dict[str, Any]:
    """Returns what the mask of a mixer may read of one sequence, positions as the mixer plans them."""
    fields = position_plans.fields_of(context, 1, length)
    types = jnp.zeros_like(fields["segments"]) if context.token_types is None else context.token_types
    plan = getattr(position_plans, mixer.plan) if isinstance(mixer, PlannedAttention) else None
    positions = token_positions(context, 1, length) if plan is None else plan(fields)
    return fields | {"token_types": types, "positions": positions}
