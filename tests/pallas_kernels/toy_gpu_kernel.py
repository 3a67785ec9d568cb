"""The smallest GPU kernel that reads, computes and writes: what tests of the tools compile, so that they need no
operation's."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 128


def doubling(x, out, staged):
    i = jax.lax.axis_index("i")
    block = pl.ds(i * BLOCK, BLOCK)
    layout = plgpu.Layout.WG_STRIDED((BLOCK,), 1)
    value = (
        plgpu.load(x.at[block], (), layout=layout)
        if jax.version.__version_info__ < (0, 11)
        else plgpu.load(x.at[block], layout=layout)
    )
    staged[...] = value * 2
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, out.at[block])
    plgpu.wait_smem_to_gmem(0)


def doubled_on_gpu(x):
    return plgpu.kernel(
        doubling,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0] // BLOCK,),
        grid_names=("i",),
        scratch_types=[plgpu.SMEM((BLOCK,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x)
