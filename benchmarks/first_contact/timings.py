"""Times a family's kernels and the libraries beside them: compiles everything first, then waits for its turn alone on
the GPU.

    python -m recollect.benchmarks.first_contact.timings FAMILY --gate FILE --seconds N

Medians of 10 turns of at least 10 ms, the device synchronised at the end of each. The gradient is timed as jax.vjp with
a cotangent that is there already, so no loss is in it.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from recollect.benchmarks.first_contact import records, turns
from recollect.benchmarks.first_contact.child import case_of, compiled, form, launching, recording_failure
from recollect.benchmarks.first_contact.families import FAMILIES, Timing
from recollect.benchmarks.kernel_case import Case
from recollect.benchmarks.kernel_checks import cotangent, drawn, with_gradients
from recollect.benchmarks.timing import floors, timed
from recollect.pallas_kernels import compile_ahead
from recollect.pallas_kernels.tuning import forced

TURNS = 10


def programs(family: str) -> Iterator[tuple[Timing, Case, str, dict[str, Callable[..., Any]]]]:
    """Compiles every form of the family, forward and with gradients; what does not compile is recorded and left out."""
    few = 1 if records.rehearsing() else None
    for timing in FAMILIES[family].timings[:few]:
        case = case_of(timing)
        x = jax.eval_shape(lambda key, case=case: case.inputs(key, jnp.bfloat16), jax.random.key(0))
        out = jax.eval_shape(functools.partial(case.run, backend="reference"), x)
        for name in timing.forms[:few]:
            begun, facts = time.monotonic(), {"form": name, "note": timing.note}
            with recording_failure(case.name, **facts):
                records.write("compiling", what=case.name, **facts)
                function = form(case, name)
                with forced(**timing.forced) if timing.forced else contextlib.nullcontext():
                    both = {"forward": compiled(function, x), "both": compiled(with_gradients(function), x, out)}
                records.write("compiled", what=case.name, **facts, seconds=round(time.monotonic() - begun, 1))
                yield timing, case, name, both


def compile_ahead_of_time(family: str) -> None:
    """Compiles the family's first program at full size for an H100 that is not here: what the simulator cannot see,
    registers and spills."""
    timing = FAMILIES[family].timings[0]
    x = jax.eval_shape(lambda key: timing.case.inputs(key, jnp.bfloat16), jax.random.key(0))
    try:
        report = compile_ahead.report("h100", lambda x: timing.case.run(x, "pallas_gpu"), x)
        records.write("compiled ahead", what=timing.case.name, report=report.line(), wrong=report.complaints())
    except compile_ahead.NotInstalled as error:
        records.write("failed", what=timing.case.name, error=str(error))


def main() -> None:
    options = turns.arguments(FAMILIES)
    if records.rehearsing():
        compile_ahead_of_time(options.name)
    ready = list(programs(options.name))
    records.write("ready")
    turns.wait(options.gate, options.seconds)
    count = 1 if records.rehearsing() else TURNS
    for timing, case, name, runs in ready:
        facts = {"form": name, "operation": timing.operation, "variant": timing.variant, "note": timing.note}
        facts["sizes"] = case.sizes
        with recording_failure(case.name, **facts):
            x = drawn(case, 0, jnp.bfloat16)
            launching(case.name, form=name, note=timing.note)
            row: dict[str, Any] = {"floor": floors(case, x, jax.devices()[0].device_kind)}
            row["forward"], row["forward_spread"] = timed(runs["forward"], x, turns=count)
            records.write("time", what=case.name, part="forward", **facts, **row)
            if not records.rehearsing():
                arguments = x, cotangent(functools.partial(case.run, backend="reference"), x)
                row["both"], row["both_spread"] = timed(runs["both"], *arguments, turns=count)
                records.write("time", what=case.name, part="both", **facts, **row)
        x = arguments = None  # free the device's memory before the next case
    records.write("done")


if __name__ == "__main__":
    main()
