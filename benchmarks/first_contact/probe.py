"""What machine this is, and whether its parts work: versions, un-jitted operations, copies, products, cuDNN, the
smallest Mosaic kernel.

python -m recollect.benchmarks.first_contact.probe
"""

import functools
import importlib.metadata
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np

from recollect.benchmarks import kernel_case, peer_side, timing
from recollect.benchmarks.first_contact import child, records

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cuda-nvcc"),
    *("torch", "triton", "numpy"),
)
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.sm,power.limit",
    "--format=csv,noheader",
)
EAGER = {
    "sum": lambda numpy, x: numpy.sum(x, axis=0),
    "exp": lambda numpy, x: numpy.exp(x),
    "cumsum": lambda numpy, x: numpy.cumsum(x, axis=0),
    "sort": lambda numpy, x: numpy.sort(x, axis=0),
    "where": lambda numpy, x: numpy.where(x > 0, x, -1.0),
}


def machine() -> dict:
    """Returns the GPU as its driver names it, and versions of what matters here."""
    versions = {package.name: package.version for package in importlib.metadata.distributions()}
    device = jax.devices()[0]
    facts = {
        "device": device.device_kind,
        "platform": device.platform,
        "versions": {name: versions[name] for name in PACKAGES if name in versions},
    }
    if shutil.which("nvidia-smi"):
        facts["nvidia_smi"] = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=20).stdout.strip()
    try:
        from jax._src.lib import cuda_versions

        facts["cudnn"] = None if cuda_versions is None else cuda_versions.cudnn_get_version()
        facts["cuda_runtime"] = None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    except Exception as error:
        facts["cudnn"] = peer_side.one_line(error)
    return facts


def eager() -> dict:
    """Returns errors of five un-jitted operations against numpy (jax#40633: wrong under CUDA 13 on some GPUs)."""
    x = np.random.default_rng(0).normal(size=(257, 129)).astype(np.float32)
    return {name: kernel_case.relative_error(call(jnp, jnp.asarray(x)), call(np, x)) for name, call in EAGER.items()}


def ceilings() -> dict:
    """Returns the rates of a large copy (bytes read and written per second) and of a large bf16 product (FLOP/s)."""
    n, d = (1 << 16, 128) if records.rehearsing() else (1 << 30, 8192)
    draw = jax.jit(lambda shape: jax.random.normal(jax.random.key(0), shape, jnp.bfloat16), static_argnums=0)
    x = draw((n,))
    copy, _ = timing.timed(jax.jit(lambda x: x * jnp.bfloat16(1.5)), x, turns=10)
    product, _ = timing.timed(jax.jit(lambda a: a @ a), draw((d, d)), turns=10)
    return {"copy_bytes_per_second": 2 * x.nbytes / copy, "product_flops_per_second": 2 * d**3 / product}


def cudnn() -> dict:
    """Returns errors of cuDNN's causal attention, as jax.nn calls it, forward and gradients, against float64."""
    arrays = list(jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, 256, 2, 64)), jnp.bfloat16))

    def both(q, k, v, do, implementation):
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(do)

    computed = jax.jit(functools.partial(both, implementation="cudnn"))(*arrays)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        expected = jax.jit(functools.partial(both, implementation="xla"))(*(np.asarray(x, np.float64) for x in arrays))
    return {
        name: kernel_case.relative_error(a, b)
        for name, a, b in zip(("o", "dq", "dk", "dv"), computed, expected, strict=True)
    }


def toy() -> dict:
    """Returns the error of the smallest Mosaic GPU kernel: copies a block in, doubles it, copies it out."""
    from jax.experimental import pallas as pl

    from recollect.pallas_kernels import mosaic_gpu

    block = 128

    def doubling(x, out, staged):
        rows = pl.ds(jax.lax.axis_index("i") * block, block)
        staged[...] = mosaic_gpu.load(x.at[rows], mosaic_gpu.plgpu.Layout.WG_STRIDED((block,), 1)) * 2
        mosaic_gpu.plgpu.commit_smem()
        mosaic_gpu.plgpu.copy_smem_to_gmem(staged, out.at[rows])
        mosaic_gpu.plgpu.wait_smem_to_gmem(0)

    def double(x):
        shapes = {
            "out_type": [jax.ShapeDtypeStruct(x.shape, x.dtype)],
            "scratch_types": [mosaic_gpu.plain((block,), jnp.float32)],
        }
        return mosaic_gpu.kernel(doubling, **shapes, grid=(4,), grid_names=("i",), name="doubling")(x)[0]

    x = np.random.default_rng(0).normal(size=(4 * block,)).astype(np.float32)
    return {"error": kernel_case.relative_error(child.compiled(double, x)(x), 2 * x)}


def main() -> None:
    for part in (machine, eager, ceilings, toy, *(() if records.rehearsing() else (cudnn,))):
        with child.recording_failure(part.__name__):
            child.launching(part.__name__)
            records.write("probe", what=part.__name__, **part())
    records.write("done")


if __name__ == "__main__":
    main()
