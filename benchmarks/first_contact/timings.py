"""Times a family's kernels and the libraries beside them: compiles everything first, then waits for its turn alone on the GPU.

    python -m benchmarks.first_contact.timings FAMILY --gate FILE --seconds N

Medians of 10 turns of at least 10 ms, the device synchronised at the end of each. The gradient is timed as jax.vjp with a cotangent that is
there already, so no loss is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.first_contact import records
from benchmarks.first_contact.child import draw, failed, form, gradient, launching, on_device, rehearsing, wait_for_turn
from benchmarks.first_contact.families import FAMILIES, Timing, tiny
from benchmarks.kernel_case import Case
from benchmarks.kernel_cases import CASES
from pallas_kernels import compile_ahead
from pallas_kernels.tuning import forced
from training.chips import chip_of

TURNS, TURN_SECONDS = 10, 0.01


def compiled(timing: Timing, case: Case, name: str) -> dict[str, Callable[..., Any]]:
    """Returns the forward program and the one with gradients."""
    function = form(case, name)
    x = jax.eval_shape(lambda key: case.inputs(key, jnp.bfloat16), jax.random.key(0))
    out = jax.eval_shape(lambda x: case.run(x, "reference"), x)
    with on_device(), forced(**timing.forced) if timing.forced else contextlib.nullcontext():
        forward = jax.jit(function).lower(x).compile()
        both = jax.jit(gradient(function)).lower(x, out, {}).compile()
    return {"forward": forward, "both": both}


def measured(run: Callable[[], Any]) -> tuple[float, float]:
    """Returns the median seconds per call and the spread of the turns, (longest - shortest) / median."""
    jax.block_until_ready(run())
    begun = time.perf_counter()
    jax.block_until_ready(run())
    calls = 1 if rehearsing() else max(1, int(TURN_SECONDS / max(time.perf_counter() - begun, 1e-5)))
    turns = []
    for _ in range(1 if rehearsing() else TURNS):
        begun = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        turns.append((time.perf_counter() - begun) / calls)
    median = statistics.median(turns)
    return median, (max(turns) - min(turns)) / median


def floors(case: Case, x: dict[str, jax.Array]) -> dict[str, float]:
    """Returns the seconds that no form can beat on this chip by its data sheet; empty where the chip is not known.

    Bytes: forward, each input and the output once; with gradients the inputs twice, output, cotangent, and each gradient.
    """
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is None:
        return {}
    out = jax.eval_shape(lambda x: case.run(x, "reference"), x)
    taken, given = sum(each.nbytes for each in x.values()), out.size * out.dtype.itemsize
    return {
        "forward": max((taken + given) / chip.bandwidth, case.work / chip.flops),
        "both": max((3 * taken + 2 * given) / chip.bandwidth, 3 * case.work / chip.flops),
    }


def programs(family: str) -> Iterator[tuple[Timing, Case, str, dict[str, Callable[..., Any]]]]:
    """Compiles every form of the family; what does not compile is recorded and left out."""
    for timing in FAMILIES[family].timings[: 1 if rehearsing() else None]:
        case = timing.case
        if rehearsing():
            case = CASES[timing.operation, timing.variant](**tiny(timing.sizes))
        for name in timing.forms[: 1 if rehearsing() else None]:
            begun = time.monotonic()
            try:
                records.write("compiling", what=case.name, form=name, note=timing.note)
                found = compiled(timing, case, name)
                records.write("compiled", what=case.name, form=name, note=timing.note, seconds=round(time.monotonic() - begun, 1))
                yield timing, case, name, found
            except Exception as error:
                failed(case.name, error, form=name, note=timing.note)


def compile_ahead_of_time(family: str) -> None:
    """Compiles the family's first program at full size for an H100 that is not here: what the simulator cannot see, registers and spills."""
    timing = FAMILIES[family].timings[0]
    x = jax.eval_shape(lambda key: timing.case.inputs(key, jnp.bfloat16), jax.random.key(0))
    try:
        report = compile_ahead.report("h100", lambda x: timing.case.run(x, "pallas_gpu"), x)
        records.write("compiled ahead", what=timing.case.name, report=report.line(), wrong=report.complaints())
    except compile_ahead.NotInstalled as error:
        records.write("failed", what=timing.case.name, error=str(error))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--gate", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    if rehearsing():
        compile_ahead_of_time(given.family)
    ready = list(programs(given.family))
    records.write("ready")
    wait_for_turn(given.gate, given.seconds)
    for timing, case, name, runs in ready:
        facts = {"form": name, "operation": timing.operation, "variant": timing.variant, "note": timing.note, "sizes": case.sizes}
        try:
            x = draw(case, 0)
            launching(case.name, form=name, note=timing.note)
            out = jax.block_until_ready(runs["forward"](x))
            cotangent = jax.jit(lambda o: jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape).astype(o.dtype))(out)
            row: dict[str, Any] = {"floor": floors(case, x)}
            row["forward"], row["forward_spread"] = measured(lambda x=x, run=runs["forward"]: run(x))
            records.write("time", what=case.name, part="forward", **facts, **row)
            if rehearsing():
                continue
            row["both"], row["both_spread"] = measured(lambda x=x, c=cotangent, run=runs["both"]: run(x, c, {}))
            records.write("time", what=case.name, part="both", **facts, **row)
        except Exception as error:
            failed(case.name, error, **facts)
        x = out = cotangent = None  # free the device's memory before the next case
    records.write("done")


if __name__ == "__main__":
    main()
