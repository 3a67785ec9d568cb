"""Compares a family's kernels with float64 on the CPU: outputs and gradients, odd lengths and packed documents, then
rows at full size.

    python -m recollect.benchmarks.first_contact.checks FAMILY [--full]

Inputs are drawn and references computed on the CPU; the device runs only what is being tested. Every program runs on
one set of inputs, then on another, then on the first again: the bits must repeat, and memory that the kernel did not
write cannot pass for right.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.benchmarks.first_contact import records, turns
from recollect.benchmarks.first_contact.child import case_of, compiled, launching, recording_failure
from recollect.benchmarks.first_contact.families import FAMILIES, Family, Timing
from recollect.benchmarks.kernel_case import Case
from recollect.benchmarks.kernel_cases import CASES, smaller
from recollect.benchmarks.kernel_checks import (
    FORWARD,
    GATE,
    GATES,
    GRADIENT,
    drawn,
    relative_error,
    with_gradients,
    wrong,
)

ROWS = 128  # compared at full size


def small(family: Family) -> None:
    """Checks every variant and head size of the family at 320 tokens, and at an odd length with documents."""
    if records.rehearsing():  # one check per family
        timing = family.timings[0]
        return _checked(case_of(timing, t=family.rehearsed), timing, documents=family.documents)
    seen = set()
    for timing in family.timings:
        case = smaller(timing.case)
        key = (timing.variant, *((name, case.sizes.get(name)) for name in "kvd"))
        if key in seen:
            continue
        seen.add(key)
        _checked(case, timing, documents=False)
        if family.odd is not None:
            odd = {**case.sizes, "t": family.odd}
            _checked(CASES[timing.operation, timing.variant](**odd), timing, documents=family.documents)


def _checked(case: Case, timing: Timing, documents: bool) -> None:
    label = case.name + (", documents" if documents else "")
    begun = time.monotonic()
    with recording_failure(label, operation=timing.operation, variant=timing.variant):
        fixed = {"segment_ids": _documents(case.sizes["b"], case.sizes["t"])} if documents else {}
        x, other = (_drawn(case, seed) for seed in (1, 2))
        like = jax.eval_shape(lambda x: case.run(x, "reference"), {**x, **fixed})
        cotangent = np.random.default_rng(0).normal(size=like.shape).astype(like.dtype)
        exact = _exactly(with_gradients(lambda x: case.run({**x, **fixed}, "reference")), x, cotangent)
        launching(label)
        run = compiled(with_gradients(lambda x: case.run({**x, **fixed}, "pallas_gpu")), x, cotangent)
        first, _, again = (jax.tree.map(np.asarray, run(each, cotangent)) for each in (x, other, x))
        errors = {"output": (relative_error(first[0], exact[0]), FORWARD)}
        for name, gradient in exact[1].items():
            errors[name] = (relative_error(first[1][name], gradient), GATE if name in GATES else GRADIENT)
        _record(label, timing, errors, first, again, begun)


def _record(label: str, timing: Timing, errors: dict[str, Any], first: Any, again: Any, begun: float) -> None:
    records.write(
        "check",
        what=label,
        operation=timing.operation,
        variant=timing.variant,
        errors={name: [float(f"{error:.3g}"), bar] for name, (error, bar) in errors.items()},
        wrong=wrong(errors),
        same_bits=jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), first, again)),
        seconds=round(time.monotonic() - begun, 1),
    )


def _documents(b: int, t: int) -> np.ndarray:
    """Returns (b, t) int32: four documents of uneven lengths, then padding."""
    ends = np.asarray([t // 7, t // 2, t // 2 + 1, t - 5])
    ids = np.searchsorted(ends, np.arange(t), side="right") + 1
    return np.broadcast_to(np.where(ids > len(ends), 0, ids), (b, t)).astype(np.int32)


def _drawn(case: Case, seed: int) -> dict[str, np.ndarray]:
    """Returns inputs drawn on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, drawn(case, seed, jnp.bfloat16))


def _exactly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function gives in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def full(family: Family) -> None:
    """Compares the last rows of one sequence and head (or eight channels) at the size that is timed, and the bits of
    two runs."""
    for timing in [family.timings[index] for index in family.full]:
        case, begun = case_of(timing), time.monotonic()
        label, channels = f"{case.name}, full size", "convolution" in timing.operation
        with recording_failure(label, operation=timing.operation, variant=timing.variant):
            x = _drawn(case, 3)
            one = {**case.sizes, **{name: 1 for name in "bh" if name in case.sizes}}
            one_case = CASES[timing.operation, timing.variant](**one)
            backend = "xla" if timing.operation in ("linear_recurrence", "taylor_attention") else "reference"
            arrays = {name: _one(each, channels) for name, each in x.items()}
            expected = _exactly(functools.partial(one_case.run, backend=backend), arrays)
            launching(label)
            run = compiled(functools.partial(case.run, backend="pallas_gpu"), x)
            first, again = (np.asarray(run(x)) for _ in range(2))
            errors = {"output": (relative_error(_one(first, channels)[:, -ROWS:], expected[:, -ROWS:]), FORWARD)}
            _record(label, timing, errors, first, again, begun)


def _one(x: np.ndarray, channels: bool) -> np.ndarray:
    """Returns the first sequence and head of (b, t, h, d), (b, t, h) or (h,); of a convolution's arrays the first
    sequence and eight channels."""
    if channels:
        return x[:1, :, :8] if x.ndim == 3 else x[:, :8]
    return x[:1] if x.ndim == 1 else x[:1, :, :1]


def main() -> None:
    options = turns.arguments(FAMILIES)
    with jax.default_matmul_precision("default"):
        (full if options.full else small)(FAMILIES[options.name])
    records.write("done")


if __name__ == "__main__":
    main()
