"""A case of `bench kernels`: an operation at a shape, how it is called and what it is compared with.

And what every form of it is held to before it is timed: the reference in fp32 (highest precision) on the same device,
at a small shape.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FORWARD, GRADIENT, GATE = 0.005, 0.01, 0.02
FULL = 1e-4
GATES = ("log_decay", "beta", "taps", "filter", "sinks", "router")
LIBRARIES = ("cudnn", "splash", "jla")
"""Backends that one operation has and the others lack."""

Arrays = dict[str, jax.Array]
Form = Callable[[Arrays], jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    operation, variant: what it is, in the words of the tables. sizes: the shape. inputs(key, dtype) -> arrays.
    run(arrays, backend) -> output; where the operation takes documents, arrays may hold `segment_ids` (b, t) besides.
    work: FLOPs of the forward pass that no form can avoid (products with the state; a chunk's own products come on top;
    for softmax attention, products of the pairs that are seen). plain: name -> function of the arrays to the
    same output without this project's operation.
    peer: its name in kernel_peers.py, or None. small: sizes, beside few sequences, heads and tokens, that errors are
    looked at with. libraries: those of LIBRARIES that are backends of it.
    """

    operation: str
    variant: str
    sizes: dict[str, int]
    inputs: Callable[[jax.Array, Any], Arrays]
    run: Callable[[Arrays, str | None], jax.Array]
    work: float
    plain: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    peer: str | None = None
    small: Mapping[str, int] = dataclasses.field(default_factory=dict)
    libraries: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.variant}, " + " ".join(f"{name}{size}" for name, size in self.sizes.items())


def drawn(case: Case, seed: int, dtype: Any) -> Arrays:
    """Returns the case's inputs, drawn by one program."""
    return jax.jit(case.inputs, static_argnums=1)(jax.random.key(seed), jnp.dtype(dtype))


def cotangent(form: Form, inputs: Arrays) -> jax.Array:
    """Returns a cosine over the last dimension in the shape and dtype of the form's output, for its gradients."""
    output = jax.eval_shape(form, inputs)
    return jax.jit(lambda: jnp.broadcast_to(jnp.cos(jnp.arange(output.shape[-1])), output.shape).astype(output.dtype))()


def with_gradients(form: Form) -> Callable[[Arrays, jax.Array], tuple[jax.Array, Arrays]]:
    """Returns the function (inputs, cotangent) -> output, and the gradients of all inputs."""

    def both(inputs: Arrays, output_cotangent: jax.Array) -> tuple[jax.Array, Arrays]:
        output, vjp = jax.vjp(form, inputs)
        return output, vjp(output_cotangent)[0]

    return both


class Check:
    """A case at a small shape and its reference, which is computed once, when the first form is held against it."""

    def __init__(self, case: Case, dtype: Any):
        self.case, self.dtype = case, jnp.dtype(dtype)

    @functools.cached_property
    def inputs(self) -> Arrays:
        """In the dtype that forms run in."""
        return drawn(self.case, 1, self.dtype)

    @functools.cached_property
    def expected(self) -> tuple[jax.Array, Arrays]:
        """Output and gradients of the reference in fp32."""
        form = functools.partial(self.case.run, backend="reference")
        exact = {name: x.astype(jnp.float32) for name, x in self.inputs.items()}
        with jax.default_matmul_precision("highest"):
            return jax.jit(with_gradients(form))(exact, cotangent(form, self.inputs).astype(jnp.float32))

    def errors(self, form: Form) -> dict[str, tuple[float, float]]:
        """Returns rms(error) / rms(reference) and its bar, for the output and each gradient.

        Forms run as users run them: bf16 at default precision, fp32 at the highest.
        """
        low = self.dtype == jnp.bfloat16
        with jax.default_matmul_precision("default" if low else "highest"):
            computed = jax.jit(with_gradients(form))(self.inputs, cotangent(form, self.inputs))
        errors = errors_of(computed, self.expected)
        return errors if low else {name: (error, FULL) for name, (error, _) in errors.items()}


def errors_of(computed: Any, expected: Any) -> dict[str, tuple[float, float]]:
    """Returns the relative error and its bar in bf16, of the output and of each gradient; both arguments are what
    `with_gradients` returns."""
    errors = {"output": (relative_error(computed[0], expected[0]), FORWARD)}
    for name, gradient in expected[1].items():
        errors[name] = (relative_error(computed[1][name], gradient), GATE if name in GATES else GRADIENT)
    return errors


def wrong(errors: Mapping[str, tuple[float, float]]) -> list[str]:
    """Returns the names of what is not within its bar, NaN included."""
    return [name for name, (error, bar) in errors.items() if not error <= bar]


def relative_error(output: Any, expected: Any, least: float = 1e-30) -> float:
    """Returns rms(output - expected) / rms(expected), the latter at least `least`; NaN where any output is."""
    output, expected = np.asarray(output, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((output - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), least))
