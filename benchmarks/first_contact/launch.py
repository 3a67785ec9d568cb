"""Runs a family's first timing once, forward and with gradients, for a profiler to look at.

ncu ... python -m benchmarks.first_contact.launch FAMILY
"""

from __future__ import annotations

import sys

import jax
import numpy as np

from benchmarks.first_contact import records
from benchmarks.first_contact.child import draw, gradient, launching, on_device, rehearsing
from benchmarks.first_contact.families import FAMILIES, tiny
from benchmarks.kernel_cases import CASES


def main() -> None:
    timing = FAMILIES[sys.argv[1]].timings[0]
    case = CASES[timing.operation, timing.variant](**tiny(timing.sizes)) if rehearsing() else timing.case
    x = draw(case, 0)
    out = jax.eval_shape(lambda x: case.run(x, "reference"), x)
    cotangent = np.random.default_rng(0).normal(size=out.shape).astype(out.dtype)
    with on_device():
        run = jax.jit(gradient(lambda x: case.run(x, "pallas_gpu")))
        launching(case.name)
        jax.block_until_ready(run(x, cotangent, {}))
    records.write("done")


if __name__ == "__main__":
    main()
