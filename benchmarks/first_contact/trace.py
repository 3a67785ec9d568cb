"""Traces a few launches with jax's profiler: the last thing done, in a process of its own, as it has crashed others
(jax#40260).

python -m recollect.benchmarks.first_contact.trace OUT
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from recollect.benchmarks.first_contact import records
from recollect.benchmarks.first_contact.child import case_of, launching, on_device
from recollect.benchmarks.first_contact.families import FAMILIES
from recollect.benchmarks.kernel_checks import drawn


def main() -> None:
    timing = FAMILIES["recurrence, decay per head"].timings[0]
    case = case_of(timing)
    x = drawn(case, 0, jnp.bfloat16)
    with on_device():
        run = jax.jit(lambda x: case.run(x, "pallas_gpu")).lower(x).compile()
    jax.block_until_ready(run(x))
    with tempfile.TemporaryDirectory() as folder:
        launching("trace")
        with jax.profiler.trace(folder):
            for _ in range(3):
                jax.block_until_ready(run(x))
        with tarfile.open(Path(sys.argv[1]) / "trace.tar.gz", "w:gz") as archive:
            archive.add(folder, arcname="trace")
    records.write("done")


if __name__ == "__main__":
    main()
