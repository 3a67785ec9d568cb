"""From a mixer's mask and what is known of its tokens to the arguments of `softmax_attention`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from recollect.configuration import UserError
from recollect.layers.context import Context
from recollect.pallas_kernels.mask_expressions import HEADS, ORDINARY, And, Everything, Mask, Not
from recollect.pallas_kernels.masks import Causal, KeyIs, QueryIs, Same, SameSegment, Window

GIVEN = {"positions", "segments", HEADS}
"""What every call has; the other fields that a mask reads come from the context."""


def further_fields(mask: Mask | None, context: Context) -> dict[str, Int[Array, "b t"]]:
    """Returns the fields beside positions and segments that a mask reads, by name, as far as the context has them."""
    if mask is None:
        return {}
    known = _known(context)
    return {name: field for name in sorted(mask.fields - GIVEN) if (field := known.get(name)) is not None}


def given(names: Iterable[str], tokens: Context) -> dict[str, Int[Array, "b t"]]:
    """Returns fields of a stream's tokens by name; 0 where the call does not give them, as of generated text."""
    assert tokens.segments is not None
    known = _known(tokens)
    return {name: jnp.zeros_like(tokens.segments) if (x := known.get(name)) is None else x for name in names}


def _known(tokens: Context) -> dict[str, Any]:
    return {"token_types": tokens.token_types, **(tokens.fields or {})}


def mask_arguments(mask: Mask, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `softmax_attention` that state which keys are seen: `window` where the mask is causal,
    or causal in a window, of whole sequences (which libraries serve too), else `mask`.

    Args:
      fields: the other arguments: positions and segments of queries and, where these are no keys of the same tokens, of
        keys; query_fields and key_fields, where the mask reads more.

    Raises:
      UserError: the mask reads a field that the tokens do not have.
    """
    further = fields.get("query_fields") or {}

    def known(leaf: Mask) -> Mask:
        if isinstance(leaf, SameSegment) and fields["query_segments"] is None:
            return Everything()
        if "token_types" in leaf.fields and "token_types" not in further:  # all ordinary
            if isinstance(leaf, QueryIs | KeyIs):
                return Everything() if ORDINARY in leaf.values else Not(Everything())
            return Everything() if isinstance(leaf, Same | Causal) else leaf
        return leaf

    mask = mask.rewritten(known)
    if missing := sorted(mask.fields - GIVEN - further.keys()):
        have = ", ".join(sorted(further)) or "none"
        raise UserError(f"the mask reads the field {missing[0]}, which the tokens do not have (further fields: {have})")
    parts = conjuncts(mask)
    windows = {part.window for part in parts if isinstance(part, Window) and part.field == "positions"}
    plain = {Causal(), SameSegment(), *map(Window, windows)}
    if "key_positions" not in fields and Causal() in parts and parts <= plain and windows != {0}:
        return {"window": min(windows, default=None)}
    return {"mask": mask}


def conjuncts(mask: Mask) -> set[Mask]:
    """Returns the expressions all of which a mask asks for."""
    return conjuncts(mask.left) | conjuncts(mask.right) if isinstance(mask, And) else {mask}
