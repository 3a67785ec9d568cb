"""Compares a family's kernels with float64 on the CPU: outputs and gradients, odd lengths and packed documents, then
rows at full size.

    python -m recollect.benchmarks.first_contact.checks FAMILY [--full]

Inputs are drawn and references computed on the CPU; the device runs only what is being tested. Every program runs on
one set of inputs, then on another, then on the first again: the bits must repeat, and memory that the kernel did not
write cannot pass for right.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from recollect.benchmarks import kernel_case, kernel_cases
from recollect.benchmarks.first_contact import child, families, records

ROWS = 128  # compared at full size
ODD = 313  # tokens of the second check, which no block size divides


def small(family: families.Family) -> None:
    """Checks every variant and head size of the family at 320 tokens, and at an odd length with documents."""
    if records.rehearsing():  # one check per family
        return _check(families.case_of(family.timings[0], t=family.rehearsed), documents=family.documents)
    different: dict = {}
    for timing in family.timings:
        different.setdefault((timing.variant, *(timing.sizes.get(name) for name in "kvd")), timing)
    for timing in different.values():
        case = kernel_cases.smaller(timing.case)
        _check(case, documents=False)
        _check(kernel_cases.resized(case, t=ODD), documents=family.documents)


def _check(case: kernel_case.Case, documents: bool) -> None:
    label, begun = case.name + (", documents" if documents else ""), time.monotonic()
    with child.recording_failure(label, operation=case.operation, variant=case.variant):
        fixed = {"segment_ids": _documents(case.sizes["b"], case.sizes["t"])} if documents else {}
        reference, kernel = (
            lambda x, name=name: case.run({**x, **fixed}, name) for name in ("reference", "pallas_gpu")
        )
        x, other = (_drawn(case, seed) for seed in (1, 2))
        like = jax.eval_shape(reference, x)
        cotangent = np.random.default_rng(0).normal(size=like.shape).astype(like.dtype)
        exact = _exactly(kernel_case.with_gradients(reference), x, cotangent)
        child.launching(label)
        run = child.compiled(kernel_case.with_gradients(kernel), x, cotangent)
        first, _, again = (jax.tree.map(np.asarray, run(each, cotangent)) for each in (x, other, x))
        _record(case, label, kernel_case.errors_of(first, exact), first, again, begun)


def _record(case: kernel_case.Case, label: str, errors: dict, first, again, begun: float) -> None:
    records.write(
        "check",
        what=label,
        operation=case.operation,
        variant=case.variant,
        errors={name: [float(f"{error:.3g}"), bar] for name, (error, bar) in errors.items()},
        wrong=kernel_case.wrong(errors),
        same_bits=jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), first, again)),
        seconds=round(time.monotonic() - begun, 1),
    )


def _documents(b: int, t: int) -> np.ndarray:
    """Returns (b, t) int32: four documents of uneven lengths, then padding."""
    ends = np.asarray([t // 7, t // 2, t // 2 + 1, t - 5])
    ids = np.searchsorted(ends, np.arange(t), side="right") + 1
    return np.broadcast_to(np.where(ids > len(ends), 0, ids), (b, t)).astype(np.int32)


def _drawn(case: kernel_case.Case, seed: int) -> dict[str, np.ndarray]:
    """Returns inputs drawn on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, kernel_case.drawn(case, seed, jnp.bfloat16))


def _exactly(function, *arguments):
    """Returns what a function gives in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(jax.jit(function)(*jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)))


def full(family: families.Family) -> None:
    """Compares the last rows of one sequence and head (or eight channels) at the size that is timed, and the bits of
    two runs."""
    for timing in [family.timings[index] for index in family.full]:
        case, begun = families.case_of(timing), time.monotonic()
        label, one = f"{case.name}, full size", functools.partial(_one, channels="convolution" in case.operation)
        with child.recording_failure(label, operation=case.operation, variant=case.variant):
            x = _drawn(case, 3)
            first_head = kernel_cases.resized(case, **{name: 1 for name in "bh" if name in case.sizes})
            backend = "xla" if case.operation in ("linear_recurrence", "taylor_attention") else "reference"
            expected = _exactly(functools.partial(first_head.run, backend=backend), jax.tree.map(one, x))
            child.launching(label)
            run = child.compiled(functools.partial(case.run, backend="pallas_gpu"), x)
            first, again = (np.asarray(run(x)) for _ in range(2))
            error = kernel_case.relative_error(one(first)[:, -ROWS:], expected[:, -ROWS:])
            _record(case, label, {"output": (error, kernel_case.FORWARD)}, first, again, begun)


def _one(x: np.ndarray, channels: bool) -> np.ndarray:
    """Returns the first sequence and head of (b, t, h, d), (b, t, h) or (h,); of a convolution's arrays the first
    sequence and eight channels."""
    if channels:
        return x[:1, :, :8] if x.ndim == 3 else x[:, :8]
    return x[:1] if x.ndim == 1 else x[:1, :, :1]


def main() -> None:
    options = child.arguments(families.FAMILIES)
    with jax.default_matmul_precision("default"):
        (full if options.full else small)(families.FAMILIES[options.name])
    records.write("done")


if __name__ == "__main__":
    main()
