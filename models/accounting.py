"""Counts parameters by part, elements of the state and FLOPs per token, from the real parameters and program."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from recollect.layers.context import Context
from recollect.models.encoder import example_source
from recollect.models.functional import FunctionalModel, flatten
from recollect.models.language_model import LanguageModel


def parameters_by_part(model: FunctionalModel) -> dict[str, int]:
    """Returns parameter counts by part: embedding, positions, landmark, each kind of mixer, mlp, norms, head; total."""
    parts: dict[str, int] = {}
    for path, leaf in flatten(model.abstract_params()).items():
        parts[_part(path, model.config)] = parts.get(_part(path, model.config), 0) + int(leaf.size)
    return {**parts, "total": sum(parts.values())}


def trainable_parameters(model: FunctionalModel) -> int:
    """Returns the number of parameters that are trained: neither constant nor frozen."""
    trained = jax.tree.map(lambda leaf, tag: leaf.size if tag else 0, model.abstract_params(), model.tags("trainable"))
    return sum(jax.tree.leaves(trained))


def _part(path: str, config: LanguageModel) -> str:
    names = path.split(".")
    if names[0] != "stack":
        return "norms" if names[0] == "final_norm" else names[0]
    stage, place, part = int(names[2]), int(names[3]), names[4]
    if part == "mixer":
        return f"mixers: {type(config.stages[stage].pattern[place]).__name__}"
    return "norms" if part.endswith("norm") else part


def state_elements_at(config: LanguageModel, vocabulary: int, length: int) -> int:
    """Returns the number of array elements in the decoding state of one sequence, for streams of this length."""
    return sum(leaf.size for leaf in jax.tree.leaves(FunctionalModel(config, vocabulary).abstract_state(length)))


def flops_per_token(model: FunctionalModel, length: int) -> float:
    """Returns FLOPs per token of the forward pass over one sequence of `length`: those of its matrix products,
    convolutions and Fourier transforms.

    A multiplication with its addition counts as 2, a complex transform of n numbers as 5 n log2 n. They are counted in
    the traced program, bodies of scans as often as they run; kernels do not report their products, so trace with XLA's
    backends.
    """
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    context = Context(source=None if model.config.encoder is None else example_source(length))
    jaxpr = jax.make_jaxpr(lambda params, tokens: model.bind(params)(tokens, context))(model.abstract_params(), tokens)
    return _flops(jaxpr.jaxpr) / length


def _flops(jaxpr: Jaxpr) -> float:
    return sum((_flops_of(equation) for equation in jaxpr.eqns), 0.0)


def _flops_of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in params["dimension_numbers"][0][0])
        return 2.0 * equation.outvars[0].aval.size * contracted
    if name == "conv_general_dilated":
        kernel, layout = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[layout[0]]
    if name == "fft":
        longer = max(equation.invars[0].aval.size, equation.outvars[0].aval.size)
        # A transform from or to real numbers takes half of the operations.
        factor = 5.0 if equation.invars[0].aval.dtype == equation.outvars[0].aval.dtype else 2.5
        return factor * longer * math.log2(max(math.prod(params["fft_lengths"]), 2))
    inner = [_flops(program) for program in _inner(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    return max(inner, default=0.0) if name == "cond" else sum(inner)


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    """Returns the programs within an equation."""
    values = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    return [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in values
        if isinstance(value, Jaxpr | ClosedJaxpr)
    ]
