"""What a model costs: parameters by part, FLOPs a token, state bytes. All taken from the real parameters, program and state."""

from __future__ import annotations

from typing import Any

import chz
import jax
import jax.numpy as jnp

from models.functional import FunctionalModel, flatten
from models.language_model import LanguageModel, state_bytes


def parameters_by_part(model: FunctionalModel) -> dict[str, int]:
    """Parameter counts: embedding, positions, landmark, each kind of mixer, mlp, norms, head; and their total."""
    parts: dict[str, int] = {}
    for path, leaf in flatten(model.abstract_params()).items():
        parts[_part(path, model.config)] = parts.get(_part(path, model.config), 0) + int(leaf.size)
    return {**parts, "total": sum(parts.values())}


def _part(path: str, config: LanguageModel) -> str:
    names = path.split(".")
    if names[0] != "stack":
        return "norms" if names[0] == "final_norm" else names[0]
    stage, place, part = int(names[2]), int(names[3]), names[4]
    if part == "mixer":
        return f"mixers: {type(config.stages[stage].pattern[place]).__name__}"
    return "norms" if part.endswith("norm") else part


def flops_per_token(model: FunctionalModel, length: int) -> float:
    """Floating-point operations of the forward pass over one sequence of `length`, a token, as XLA counts the lowered program.

    Layers are unrolled for this: XLA counts a loop's body once.
    """
    flat = FunctionalModel(chz.replace(model.config, unroll=True, remat="none"), model.vocabulary)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    lowered = jax.jit(lambda params, tokens: flat.bind(params)(tokens)).lower(flat.abstract_params(), tokens)
    cost: Any = lowered.cost_analysis()
    return float(cost["flops"]) / length


def state_bytes_at(config: LanguageModel, vocabulary: int, lengths: list[int]) -> dict[str, int]:
    """Bytes of the decoding state of one sequence, for streams of the given lengths; the model's own cursor is left out.

    Keys are strings, as JSON has them. Lengths that the model cannot take are left out.
    """
    model = FunctionalModel(config, vocabulary)
    limit = config.maximum_length()
    found = {}
    for length in lengths:
        if limit is not None and length > limit:
            continue
        state = jax.eval_shape(lambda params, length=length: model.bind(params).init_state(1, length).layers, model.abstract_params())
        found[str(length)] = state_bytes(state)
    return found


def state_elements_at(config: LanguageModel, vocabulary: int, length: int) -> int:
    """Number of array elements in that state."""
    model = FunctionalModel(config, vocabulary)
    state = jax.eval_shape(lambda params: model.bind(params).init_state(1, length).layers, model.abstract_params())
    return sum(leaf.size for leaf in jax.tree.leaves(state))
