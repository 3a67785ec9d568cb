"""Runs a family's first timing once, forward and with gradients, for a profiler to look at.

ncu ... python -m recollect.benchmarks.first_contact.launch FAMILY
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

from recollect.benchmarks.first_contact import records
from recollect.benchmarks.first_contact.child import case_of, launching, on_device
from recollect.benchmarks.first_contact.families import FAMILIES
from recollect.benchmarks.kernel_checks import cotangent, drawn, with_gradients


def main() -> None:
    timing = FAMILIES[sys.argv[1]].timings[0]
    case = case_of(timing)
    x = drawn(case, 0, jnp.bfloat16)
    given = cotangent(lambda x: case.run(x, "reference"), x)
    with on_device():
        run = jax.jit(with_gradients(lambda x: case.run(x, "pallas_gpu")))
        launching(case.name)
        jax.block_until_ready(run(x, given))
    records.write("done")


if __name__ == "__main__":
    main()
