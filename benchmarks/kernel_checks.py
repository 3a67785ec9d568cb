"""What `bench kernels` holds every form to before it is timed: the reference in fp32 (highest precision) on the same
device, at a small shape."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.benchmarks.kernel_case import Arrays, Case

FORWARD, GRADIENT, GATE = 0.005, 0.01, 0.02
FULL = 1e-4
GATES = ("log_decay", "beta", "taps", "filter", "sinks", "router")

Form = Callable[[Arrays], jax.Array]


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
            output, gradients = jax.jit(with_gradients(form))(self.inputs, cotangent(form, self.inputs))
        errors = {"output": (relative_error(output, self.expected[0]), FORWARD)}
        for name, gradient in gradients.items():
            errors[name] = (relative_error(gradient, self.expected[1][name]), GATE if name in GATES else GRADIENT)
        return errors if low else {name: (error, FULL) for name, (error, _) in errors.items()}


def wrong(errors: Mapping[str, tuple[float, float]]) -> list[str]:
    """Returns the names of what is not within its bar, NaN included."""
    return [name for name, (error, bar) in errors.items() if not error <= bar]


def relative_error(output: Any, expected: Any, least: float = 1e-30) -> float:
    """Returns rms(output - expected) / rms(expected), the latter at least `least`; NaN where any output is."""
    output, expected = np.asarray(output, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((output - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), least))
