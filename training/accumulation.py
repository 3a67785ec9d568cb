"""Gradients of a batch in pieces, to fit memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.data.batch import Batch
from recollect.models.functional import FunctionalModel, Params
from recollect.training.loss import context_of


def accumulated(
    model: FunctionalModel,
    gradient: Callable[..., Any],
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    count: int,
) -> Any:
    """Returns what `gradient` returns, added up over `count` pieces of the batch.

    An auxiliary loss is formed from sums over the tokens of all pieces, and its gradient by the parameters of one piece
    depends on the others' sums. Models that have one therefore run forward once more, before, for these sums alone.

    Args:
      gradient: of (params, piece, key of the piece, sums over tokens of the batch or None) -> (gradients, (metrics,
        sums over tokens of the piece or None)).
      batch: of rows that `count` divides.
      key: for dropout.
    """
    pieces = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
    keys = None if key is None else jax.random.split(key, count)
    first = jax.tree.map(lambda leaf: leaf[0], (pieces, keys))

    def sums_of(params: Params, piece: Batch, key: jax.Array | None) -> Any:
        return model.bind(params).hidden(piece.tokens, context_of(piece, key)).sums

    def added_up(function: Callable[..., Any], shapes: Any) -> Any:
        def body(total: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, function(params, *piece)), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(body, zeros, (pieces, keys))[0]

    shapes = jax.eval_shape(gradient, params, *first)
    sums, whole = shapes[1][1], None
    if sums is not None and jax.eval_shape(lambda sums: sums.formed()[0], sums):
        whole = added_up(sums_of, sums)
    return added_up(lambda *arguments: gradient(*arguments, whole), shapes)
