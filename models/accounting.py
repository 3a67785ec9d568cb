"""What a model costs: parameters by part and FLOPs per token, taken from the real parameters and program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import chz
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from recollect.models.functional import FunctionalModel, flatten
from recollect.models.language_model import LanguageModel


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
    """Floating-point operations of the forward pass over one sequence of `length`, a token, as XLA counts the lowered
    program: bodies of scans as often as they run, and of loops without a known length once."""
    flat = FunctionalModel(chz.replace(model.config, unroll=False, remat="none"), model.vocabulary)
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
        for inner in _inner(equation.params):
            yield from _scans(inner)


def products_per_token(model: FunctionalModel, length: int) -> float:
    """Floating-point operations of the forward pass's matrix products, convolutions and Fourier transforms over one
    sequence of `length`,
    a token: 2 for a multiplication with its addition, 5 n log2 n for a complex transform of n numbers.

    Counted in the traced program, scans as often as they run, so it holds for operations that say their products: XLA's
    forms.
    """
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda params, tokens: model.bind(params)(tokens))(model.abstract_params(), tokens)
    return _products(jaxpr.jaxpr) / length


def _products(jaxpr: Jaxpr) -> float:
    return sum((_products_of(equation) for equation in jaxpr.eqns), 0.0)


def _products_of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in params["dimension_numbers"][0][0])
        return 2.0 * equation.outvars[0].aval.size * contracted
    if name == "conv_general_dilated":
        kernel, layout = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[layout[0]]
    if name == "fft":
        size = math.prod(params["fft_lengths"])
        longer = max(equation.invars[0].aval.size, equation.outvars[0].aval.size)
        # A transform from or to real numbers takes half of the operations.
        return (
            (5.0 if equation.invars[0].aval.dtype == equation.outvars[0].aval.dtype else 2.5)
            * longer
            * math.log2(max(size, 2))
        )
    inner = [_products(found) for found in _inner(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    return max(inner, default=0.0) if name == "cond" else sum(inner)


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    """The programs within an equation."""
    values = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    return [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in values
        if isinstance(value, Jaxpr | ClosedJaxpr)
    ]
