"""Compares a family's kernels with float64 on the CPU: outputs and gradients, odd lengths and packed documents, then
rows at full size.

    python -m recollect.benchmarks.first_contact.checks FAMILY [--full]

Inputs are drawn and references computed on the CPU; the device runs only what is being tested. Every program runs on
one set of
inputs, then on another, then on the first again: the bits must repeat, and memory that the kernel did not write cannot
pass for right.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.benchmarks.first_contact import records
from recollect.benchmarks.first_contact.child import case_of, failed, launching, on_device
from recollect.benchmarks.first_contact.families import FAMILIES, Family, Timing
from recollect.benchmarks.kernel_case import Case
from recollect.benchmarks.kernel_cases import CASES, smaller
from recollect.benchmarks.kernel_checks import FORWARD, GATE, GATES, GRADIENT, drawn, relative_error, with_gradients

ROWS = 128  # compared at full size


def small(family: Family) -> None:
    """Checks every variant and head size of the family at 320 tokens, and at an odd length with documents."""
    seen = set()
    for timing in family.timings:
        if records.rehearsing():  # one check a family
            return _checked(case_of(timing, t=family.rehearsed), timing, documents=family.documents)
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
    try:
        cpu = jax.devices("cpu")[0]
        fixed = {"segment_ids": _documents(case.sizes["b"], case.sizes["t"])} if documents else {}
        with jax.default_device(cpu):
            sets = [jax.tree.map(np.asarray, drawn(case, seed, jnp.bfloat16)) for seed in (1, 2)]
        like = jax.eval_shape(lambda x: case.run(x, "reference"), {**sets[0], **fixed})
        cotangent = np.random.default_rng(0).normal(size=like.shape).astype(like.dtype)
        expected, expected_gradients = _exactly(case, sets[0], cotangent, fixed)
        launching(label)
        with on_device():
            run = (
                jax.jit(with_gradients(lambda x: case.run({**x, **fixed}, "pallas_gpu")))
                .lower(sets[0], cotangent)
                .compile()
            )
            first, _, again = (jax.tree.map(np.asarray, run(x, cotangent)) for x in (sets[0], sets[1], sets[0]))
        errors = {"output": (relative_error(first[0], expected), FORWARD)}
        for name, x in expected_gradients.items():
            errors[name] = (relative_error(first[1][name], x), GATE if name in GATES else GRADIENT)
        same = jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), first, again))
        wrong = [name for name, (error, bar) in errors.items() if not error <= bar]
        _record(label, timing, errors, wrong, same, begun)
    except Exception as error:
        failed(label, error, operation=timing.operation, variant=timing.variant)


def _record(label: str, timing: Timing, errors: dict[str, Any], wrong: list[str], same: bool, begun: float) -> None:
    records.write(
        "check",
        what=label,
        operation=timing.operation,
        variant=timing.variant,
        errors={name: [float(f"{error:.3g}"), bar] for name, (error, bar) in errors.items()},
        wrong=wrong,
        same_bits=same,
        seconds=round(time.monotonic() - begun, 1),
    )


def _documents(b: int, t: int) -> np.ndarray:
    """(b, t) int32: four documents of uneven lengths, then padding."""
    ends = np.asarray([t // 7, t // 2, t // 2 + 1, t - 5])
    ids = np.searchsorted(ends, np.arange(t), side="right") + 1
    return np.broadcast_to(np.where(ids > len(ends), 0, ids), (b, t)).astype(np.int32)


def _exactly(case: Case, x: dict[str, Any], cotangent: Any, fixed: dict[str, Any]) -> Any:
    """The reference and its gradients in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = {name: np.asarray(each, np.float64) for name, each in x.items()}
        run = jax.jit(with_gradients(lambda x: case.run({**x, **fixed}, "reference")))
        return jax.tree.map(np.asarray, run(wide, np.asarray(cotangent, np.float64)))


def full(family: Family) -> None:
    """Compares the last rows of one sequence and head (or eight channels) at the size that is timed, and the bits of
    two runs."""
    for timing in [family.timings[index] for index in family.full]:
        case = case_of(timing)
        label, channels = f"{case.name}, full size", "convolution" in timing.operation
        begun = time.monotonic()
        try:
            with jax.default_device(jax.devices("cpu")[0]):
                x = jax.tree.map(np.asarray, drawn(case, 3, jnp.bfloat16))
            one = CASES[timing.operation, timing.variant](
                **{**case.sizes, **{name: 1 for name in "bh" if name in case.sizes}}
            )
            with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                wide = {name: np.asarray(_one(each, channels), np.float64) for name, each in x.items()}
                backend = "xla" if timing.operation in ("linear_recurrence", "taylor_attention") else "reference"
                expected = np.asarray(jax.jit(lambda x, one=one, name=backend: one.run(x, name))(wide))
            launching(label)
            with on_device():
                run = jax.jit(lambda x, case=case: case.run(x, "pallas_gpu")).lower(x).compile()
                first, again = (np.asarray(run(x)) for _ in range(2))
            errors = {"output": (relative_error(_one(first, channels)[:, -ROWS:], expected[:, -ROWS:]), FORWARD)}
            wrong = [name for name, (error, bar) in errors.items() if not error <= bar]
            _record(label, timing, errors, wrong, first.tobytes() == again.tobytes(), begun)
        except Exception as error:
            failed(label, error, operation=timing.operation, variant=timing.variant)


def _one(x: np.ndarray, channels: bool) -> np.ndarray:
    """The first sequence and head of (b, t, h, d), (b, t, h) or (h,); of a convolution's arrays the first sequence
    and eight channels."""
    if channels:
        return x[:1, :, :8] if x.ndim == 3 else x[:, :8]
    return x[:1] if x.ndim == 1 else x[:1, :, :1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    with jax.default_matmul_precision("default"):
        (full if options.full else small)(FAMILIES[options.family])
    records.write("done")


if __name__ == "__main__":
    main()
