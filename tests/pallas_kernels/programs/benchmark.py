"""What `bench kernels` runs on an H100, case by case as benchmarks/kernel_cases.py lists them: forward, and forward
with the gradients of all inputs."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from recollect.benchmarks.kernel_case import Arrays, Case
from recollect.benchmarks.kernel_cases import OPERATIONS, cases
from tests.pallas_kernels.programs import Program

REFUSED = {"long_convolution, explicit filter, b16 t8192 d768"}
"""Cases that no kernel serves on GPUs."""

QUICK = {
    "linear_recurrence, decay per head, b2 t16384 h16 k128 v128",
    "softmax_attention, window, sinks, b4 t4096 h16 k128 v128 w512 g4",
}
"""Cases of which every change compiles the gradient: a sequence cut in spans, shared key heads with sinks."""


def _gradients(case: Case, x: Arrays) -> tuple[jax.Array, Arrays]:
    output, back = jax.vjp(functools.partial(case.run, backend="pallas_gpu"), x)
    return output, back(output)[0]  # any array of this shape and dtype serves as the cotangent


def _programs() -> Iterator[Program]:
    for case in cases("gpu", list(OPERATIONS)):
        if case.name in REFUSED:
            continue
        shapes = jax.eval_shape(functools.partial(case.inputs, dtype=jnp.bfloat16), jax.random.key(0))
        kinds = {
            "forward": functools.partial(case.run, backend="pallas_gpu"),
            "gradient": functools.partial(_gradients, case),
        }
        for kind, function in kinds.items():
            name = case.name.replace(",", f" bench {kind}", 1)
            yield Program(name, "pallas_gpu", function, (shapes,), quick=kind == "gradient" and case.name in QUICK)


PROGRAMS = list(_programs())
