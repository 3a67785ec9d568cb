"""Launches a few kernels for a profiler to look at.

    ncu ... python -m recollect.benchmarks.first_contact.profilers FAMILY      # forward and with gradients, once
    python -m recollect.benchmarks.first_contact.profilers --trace OUT         # jax's profiler: OUT/trace.tar.gz

The trace is the last thing done, in a process of its own, as it has crashed others (jax#40260).
"""

import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from recollect.benchmarks import kernel_case
from recollect.benchmarks.first_contact import child, families, records


def launch(family: str) -> None:
    """Runs the family's first timing."""
    case = families.case_of(families.FAMILIES[family].timings[0])
    x = kernel_case.drawn(case, 0, jnp.bfloat16)
    arguments = x, kernel_case.cotangent(lambda x: case.run(x, "reference"), x)
    run = child.compiled(kernel_case.with_gradients(lambda x: case.run(x, "pallas_gpu")), *arguments)
    child.launching(case.name)
    jax.block_until_ready(run(*arguments))


def trace(out: str) -> None:
    """Runs a recurrence three times under jax's profiler and packs what that wrote into a folder."""
    case = families.case_of(families.FAMILIES["recurrence, decay per head"].timings[0])
    x = kernel_case.drawn(case, 0, jnp.bfloat16)
    run = child.compiled(lambda x: case.run(x, "pallas_gpu"), x)
    jax.block_until_ready(run(x))
    with tempfile.TemporaryDirectory() as folder:
        child.launching("trace")
        with jax.profiler.trace(Path(folder) / "trace"):
            for _ in range(3):
                jax.block_until_ready(run(x))
        shutil.make_archive(str(Path(out) / "trace"), "gztar", folder, "trace")


if __name__ == "__main__":
    trace(sys.argv[2]) if sys.argv[1] == "--trace" else launch(sys.argv[1])
    records.write("done")
