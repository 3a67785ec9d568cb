"""Compiles every program for every chip it must compile for, and prints a table: program, chip, seconds, memory,
registers, spills.

    python -m tests.pallas_kernels.programs [--quick] [--only PART_OF_NAME] [--chip h100] [--lower]

It fails where lowering or compiling fails, on any spilled byte, on serialised wgmma and on more instructions for
special functions than a program may hold; --lower stops after lowering.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import jax

from recollect.pallas_kernels import compile_ahead
from tests.pallas_kernels.programs import Program, all_programs

LIMIT = 120.0  # seconds to trace and lower one program in


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.pallas_kernels.programs",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--chip", action="append", choices=compile_ahead.CHIPS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", metavar="PART")
    parser.add_argument("--lower", action="store_true", help="lower for CUDA only, which needs no compiler")
    given = parser.parse_args(arguments)
    chips = ["cuda"] if given.lower else given.chip or list(compile_ahead.CHIPS)
    begun, failures, count = time.perf_counter(), [], 0
    for program in all_programs(quick=given.quick, only=given.only):
        for chip in chips:
            if chip not in (("cuda",) if given.lower and program.backend == "pallas_gpu" else program.chips):
                continue
            count += 1
            line, wrong = _lowered(program) if given.lower else _compiled(program, chip)
            print(f"{program.name:64} {line}", flush=True)
            failures += [f"{program.name} for {chip}: {what}" for what in wrong]
    print(
        f"{count} programs, {len(failures)} failures, {time.perf_counter() - begun:.0f} s "
        f"(jax {jax.__version__}, {', '.join(chips)})"
    )
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def _compiled(program: Program, chip: str) -> tuple[str, list[str]]:
    try:
        report = compile_ahead.report(chip, program.function, *program.arguments, limit=LIMIT)
    except compile_ahead.NotInstalled:
        raise
    except Exception as error:
        return f"{chip:4} failed", [f"{type(error).__name__}: {str(error)[:2000]}"]
    return report.line(), program.complaints(report)


def _lowered(program: Program) -> tuple[str, list[str]]:
    begun = time.perf_counter()
    try:
        compile_ahead.lower_for_cuda(program.function, *program.arguments, limit=LIMIT)
    except Exception as error:
        return "cuda failed", [f"{type(error).__name__}: {str(error)[:2000]}"]
    return f"cuda {time.perf_counter() - begun:5.1f} s lowered", []


if __name__ == "__main__":
    try:
        sys.exit(main())
    except compile_ahead.NotInstalled as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
