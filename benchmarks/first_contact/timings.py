"""Times a family's kernels and the libraries beside them: compiles everything first, then waits for its turn alone on
the GPU.

    python -m recollect.benchmarks.first_contact.timings FAMILY --gate FILE --seconds N

Medians of 10 turns of at least 10 ms, the device synchronised at the end of each. The gradient is timed as jax.vjp with
a cotangent that is there already, so no loss is in it.
"""

import functools
import time

import jax
import jax.numpy as jnp

from recollect.benchmarks import kernel_case, timing
from recollect.benchmarks.first_contact import child, families, records
from recollect.pallas_kernels import compile_ahead, tuning

TURNS = 10
JLA_KINDS = {
    "decay per head": "simple_gla",
    "decay per channel": "gla",
    "gated delta, decay per head": "gated_deltanet",
    "gated delta, decay per channel": "kda",
}
"""Names of the recurrences in jax-linear-attention."""


def form(case: kernel_case.Case, name: str) -> kernel_case.Form:
    """Returns the case on a backend, one of its plain forms, or jax-linear-attention's own kernels ("jla")."""
    if name == "jla":
        return functools.partial(_jla, case.variant)
    return case.plain[name] if name in case.plain else lambda x: case.run(x, name)


def _jla(variant: str, x: kernel_case.Arrays) -> jax.Array:
    from jla.ops import linear_attention

    gates = {"g": x["log_decay"]} if "log_decay" in x else {}
    gates |= {"beta": x["beta"].astype(x["v"].dtype)} if "beta" in x else {}
    return linear_attention(JLA_KINDS[variant], x["q"], x["k"], x["v"], impl="mosaic_gpu", **gates)[0]


def programs(family: str):
    """Compiles every form of the family, forward and with gradients; what does not compile is recorded and left out.

    Yields the case, what is recorded of a time beside it, and the programs.
    """
    few = 1 if records.rehearsing() else None
    for entry in families.FAMILIES[family].timings[:few]:
        case = families.case_of(entry)
        x = jax.eval_shape(functools.partial(case.inputs, dtype=jnp.bfloat16), jax.random.key(0))
        out = jax.eval_shape(functools.partial(case.run, backend="reference"), x)
        for name in entry.forms[:few]:
            begun, facts = time.monotonic(), {"form": name, "note": entry.note}
            with child.recording_failure(case.name, **facts):
                records.write("compiling", what=case.name, **facts)
                function = form(case, name)
                with tuning.forced(**entry.forced):
                    runs = {"forward": child.compiled(function, x)}
                    runs["both"] = child.compiled(kernel_case.with_gradients(function), x, out)
                records.write("compiled", what=case.name, **facts, seconds=round(time.monotonic() - begun, 1))
                yield case, {**facts, "operation": case.operation, "variant": case.variant, "sizes": case.sizes}, runs


def compile_ahead_of_time(family: str) -> None:
    """Compiles the family's first program at full size for an H100 that is not here: what the simulator cannot see,
    registers and spills."""
    case = families.FAMILIES[family].timings[0].case
    x = jax.eval_shape(functools.partial(case.inputs, dtype=jnp.bfloat16), jax.random.key(0))
    try:
        report = compile_ahead.report("h100", functools.partial(case.run, backend="pallas_gpu"), x)
        records.write("compiled ahead", what=case.name, report=report.line(), wrong=report.complaints())
    except compile_ahead.NotInstalled as error:
        records.write("failed", what=case.name, error=str(error))


def main() -> None:
    options = child.arguments(families.FAMILIES)
    if records.rehearsing():
        compile_ahead_of_time(options.name)
    ready = list(programs(options.name))
    records.write("ready")
    child.wait(options.gate, options.seconds)
    timed = functools.partial(timing.timed, turns=1 if records.rehearsing() else TURNS)
    for case, facts, runs in ready:
        with child.recording_failure(case.name, **facts):
            x = kernel_case.drawn(case, 0, jnp.bfloat16)
            child.launching(case.name, form=facts["form"], note=facts["note"])
            row: dict = {"floor": timing.floors(case, x, jax.devices()[0].device_kind)}
            row["forward"], row["forward_spread"] = timed(runs["forward"], x)
            records.write("time", what=case.name, part="forward", **facts, **row)
            if not records.rehearsing():
                given = kernel_case.cotangent(functools.partial(case.run, backend="reference"), x)
                row["both"], row["both_spread"] = timed(runs["both"], x, given)
                records.write("time", what=case.name, part="both", **facts, **row)
        x = given = None  # free the device's memory before the next case
    records.write("done")


if __name__ == "__main__":
    main()
