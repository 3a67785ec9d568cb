"""What a model costs: parameters by part, FLOPs a token, state bytes. All taken from the real parameters, program and state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chz
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

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
    """Floating-point operations of the forward pass over one sequence of `length`, a token, as XLA counts the lowered program: bodies of
    scans as often as they run, and of loops without a known length once."""
    flat = FunctionalModel(chz.replace(model.config, unroll=True, remat="none"), model.vocabulary)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda params, tokens: flat.bind(params)(tokens))(flat.abstract_params(), tokens)
    return _flops(jaxpr)[0] / length


def _flops(jaxpr: ClosedJaxpr) -> tuple[float, float]:
    """Operations with scans run to their end, and as XLA counts, which takes each loop's body once."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jaxpr.in_avals]
    cost: Any = jax.jit(jaxpr_as_fun(jaxpr)).lower(*shapes).cost_analysis()
    counted = float(cost.get("flops", 0.0))
    total = counted
    for scan in _scans(jaxpr.jaxpr):
        whole, once = _flops(scan.params["jaxpr"])
        total += scan.params["length"] * whole - once
    return total, counted


def _scans(jaxpr: Any) -> Iterator[Any]:
    """The scans of a program, those within other scans left out."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from _scans(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


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
