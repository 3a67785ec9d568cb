"""What a scan compiled for an H100 reads and writes, whichever jax compiles it: `.ci/gpu-interpreter` runs this with
jax 0.11 too."""

import jax
import jax.numpy as jnp
import pytest

from recollect.cost.hlo_cost import work_of
from recollect.pallas_kernels import compile_ahead, compilers


def test_stacks_of_a_scan_count_a_row_a_turn():
    """Forward and back through 24 products of 512 x 512 arrays. Each turn touches a dozen such arrays, not the stacks
    of 24, of which it reads a row and writes another in place."""
    try:
        compilers.files("cuda")
    except compilers.NotInstalled as error:
        pytest.skip(str(error))
    turns, size = 24, 512

    def loss(weights, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return jnp.sum(x)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((turns, size, size), (size, size))]
    work = work_of(compile_ahead.report("h100", jax.value_and_grad(loss), *shapes, kernels=False).compiled.as_text())
    assert work.products == 3 * turns * 2 * size**3
    array = 2 * size * size
    # Forward: x, w, product and x kept; backward: the same, two products, of which sums of partial ones in fp32 are the
    # largest part.
    assert turns * 10 * array < work.bytes < turns * 100 * array
