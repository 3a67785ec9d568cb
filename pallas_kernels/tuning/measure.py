"""Measures block sizes on the device it runs on, and rewrites that device's table:

    python -m recollect.pallas_kernels.tuning.measure [KERNEL ...] [--repeats 20] [--dry]

Kernels are named in pallas_kernels/OPERATION/tunables.py, each a `Tunable` in TUNABLES. Every candidate is first
checked against the operation's other form; one that does not compile or is wrong is told of and left out. A time is the
median, over repeats, of runs that end when the device is done, after a warm-up. The table gets the fastest candidate of
each key.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from recollect import pallas_kernels
from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.tuning import Key, Sizes, forced, tables

ENOUGH = 0.01  # seconds that a timed run lasts at least, in as many calls as it takes: a launch costs the host some 50 microseconds


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A kernel whose block sizes are measured.

    kernel: the name that it asks `block_sizes` for.
    platform: "gpu" or "tpu".
    keys: what is measured.
    heuristic: as handed to `block_sizes`.
    candidates: candidates(key) -> sizes to try; the heuristic's are tried without being named.
    build: build(key) -> (function, other, arguments): the function that runs the kernel, one that computes the same
      without it, and arrays for both.
    tolerance: of rms(error) / rms(other's), for each array of the result.
    """

    kernel: str
    platform: str
    keys: Sequence[Key]
    heuristic: Callable[..., Sizes]
    candidates: Callable[[Key], Iterable[Sizes]]
    build: Callable[[Key], tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]
    tolerance: float = 0.02


def all_tunables() -> list[Tunable]:
    """Those of all operations."""
    found: list[Tunable] = []
    for path in sorted(Path(pallas_kernels.__path__[0]).glob("*/tunables.py")):
        found += importlib.import_module(f"recollect.pallas_kernels.{path.parent.name}.tunables").TUNABLES
    return found


def measure(tunable: Tunable, key: Key, repeats: int, log: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The table's entry for one key, or None where no candidate is right."""
    function, other, arguments = tunable.build(key)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(other)(*arguments)
    defaults = tunable.heuristic(**key)
    times: list[tuple[float, Sizes]] = []
    for sizes in [defaults] + [sizes for sizes in tunable.candidates(key) if sizes != defaults]:
        try:
            with forced(**{tunable.kernel: sizes}):
                compiled = jax.jit(lambda *args: function(*args)).lower(*arguments).compile()
            wrong = _error(compiled(*arguments), expected)
        except Exception as error:  # compilers raise their own kinds
            log(f"  {sizes}: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
            continue
        if not wrong <= tunable.tolerance:  # NaN is wrong too
            log(f"  {sizes}: wrong by {wrong:.3g}, more than {tunable.tolerance:g}")
            continue
        times.append((_median_seconds(compiled, arguments, repeats), sizes))
        log(f"  {sizes}: {times[-1][0] * 1e3:.3f} ms")
    if not times:
        return None
    best, sizes = min(times, key=lambda timed: timed[0])
    by_heuristic = next((seconds for seconds, tried in times if tried == defaults), None)
    return {
        "key": dict(key),
        "sizes": dict(sizes),
        "milliseconds": round(best * 1e3, 4),
        "heuristic_milliseconds": None if by_heuristic is None else round(by_heuristic * 1e3, 4),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _error(found: Any, expected: Any) -> float:
    def relative(one: jax.Array, two: jax.Array) -> jax.Array:
        one, two = one.astype(jnp.float32), two.astype(jnp.float32)
        return jnp.sqrt(jnp.mean((one - two) ** 2) / jnp.maximum(jnp.mean(two**2), 1e-30))

    errors = jax.tree.leaves(jax.tree.map(relative, found, expected))
    return float(jnp.max(jnp.stack(errors)))  # jnp's maximum keeps a NaN


def _median_seconds(function: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> float:
    def run(calls: int) -> float:
        begun = time.perf_counter()
        for _ in range(calls - 1):
            function(*arguments)
        jax.block_until_ready(function(*arguments))
        return (time.perf_counter() - begun) / calls

    run(3)
    calls = max(1, round(ENOUGH / run(3)))
    return statistics.median(run(calls) for _ in range(repeats))


def main(
    arguments: Sequence[str] | None = None,
    tunables: Sequence[Tunable] | None = None,
    log: Callable[[str], None] = print,
) -> int:
    """The command line. Exit code 2 and one line where this device is not measured on, or a name is unknown."""
    parser = argparse.ArgumentParser(
        prog="python -m recollect.pallas_kernels.tuning.measure", description="Measures block sizes on this device."
    )
    parser.add_argument(
        "kernels", nargs="*", metavar="KERNEL", help="names, or operations (default: all of this platform)"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dry", action="store_true", help="measure, and leave the table as it is")
    given = parser.parse_args(arguments)
    device = dispatch.device()
    if device.platform == "cpu":
        print(
            "error: block sizes are measured on the device they are for; this machine has a CPU only", file=sys.stderr
        )
        return 2
    known = [one for one in (all_tunables() if tunables is None else tunables) if one.platform == device.platform]
    wanted = [
        one
        for one in known
        if not given.kernels or any(name in (one.kernel, one.kernel.split(".")[0]) for name in given.kernels)
    ]
    unknown = [
        name for name in given.kernels if not any(name in (one.kernel, one.kernel.split(".")[0]) for one in known)
    ]
    if unknown or not wanted:
        names = ", ".join(one.kernel for one in known) or "none"
        print(
            f"error: no kernel of this platform is called {', '.join(unknown) or 'anything'}; measurable are: {names}",
            file=sys.stderr,
        )
        return 2
    for tunable in wanted:
        entries = []
        for key in tunable.keys:
            log(f"{tunable.kernel} {dict(key)}")
            entry = measure(tunable, key, given.repeats, log)
            if entry is None:
                log("  no candidate is right: no entry")
            else:
                entries.append(entry)
        if entries and not given.dry:
            log(f"written: {tables.write(device.kind, tunable.kernel, entries)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
