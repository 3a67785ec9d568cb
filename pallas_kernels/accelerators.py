"""Whether kernels, and the libraries that are backends, run on an accelerator or simulated."""

from __future__ import annotations

import functools
import importlib.metadata
import re

import jax

from recollect.pallas_kernels.dispatch import RUNS_ON, Device, Refusal

JLA_JAX = "0.11.2"
"""The one version of jax that jax-linear-attention 0.1.0 runs on."""


def kernels_run_on(backend: str, device: Device, *, simulated: bool, aimed: bool) -> Refusal:
    """Returns why kernels of this backend cannot run on `device`, or None; `aimed`: it may be another machine's."""
    runs_on = RUNS_ON[backend]
    if backend == "cudnn":
        if simulated:
            return "cuDNN is no kernel that could be simulated"
        if device.platform != "gpu":
            return f"it runs on {runs_on}; this is {device.platform}"
        return cudnn_runs_here(device, not aimed)
    if backend == "jla" and (reason := jla_is_here()):
        return reason
    if backend == "pallas_gpu" and jax.version.__version_info__ < (0, 11) and not aimed:
        return f"Mosaic GPU kernels run from jax 0.11 on; this is {jax.__version__}"
    if simulated:
        return None
    if runs_on == "TPUs":
        return None if device.platform == "tpu" else f"it runs on {runs_on}; this is {device.platform}"
    if device.platform == "gpu" and is_hopper(device.kind):
        return None
    return f"it runs on {runs_on}; this is {device.kind if device.platform == 'gpu' else device.platform}"


def is_hopper(kind: str) -> bool:
    """Returns whether a device of this name has Hopper's tensor cores (compute capability 9.0)."""
    return any(name in kind for name in ("H100", "H200", "H800", "H20", "GH200"))


@functools.cache
def jla_is_here() -> Refusal:
    """Returns why jax-linear-attention cannot be used, or None."""
    try:
        importlib.metadata.version("jax-linear-attention")
    except importlib.metadata.PackageNotFoundError:
        return "jax-linear-attention is not installed (pip install 'recollect[jla]', from Python 3.12 on)"
    if jax.__version__ != JLA_JAX:
        return f"jax-linear-attention needs jax {JLA_JAX}; this is {jax.__version__}"
    return None


def cudnn_runs_here(traced_for: Device, here: bool) -> Refusal:
    """Returns why cuDNN cannot run on this GPU, or None. `here`: whether it is this machine's."""
    if here:
        capability = getattr(jax.devices()[0], "compute_capability", "")
        if not re.fullmatch(r"\d+\.\d+", capability) or tuple(int(x) for x in capability.split(".")) < (8, 0):
            return f"it runs on NVIDIA GPUs from Ampere on; this is {traced_for.kind}"
    if not has_cudnn():
        return "jax finds no cuDNN on this machine"
    return None


def has_cudnn() -> bool:
    """Returns whether jax finds cuDNN. Its functions ask the library for its version while they are traced, so without
    it they cannot even be lowered."""
    try:
        from jax._src.lib import cuda_versions  # there is no public function

        return cuda_versions is not None and cuda_versions.cudnn_get_version() > 0
    except Exception:  # whatever a missing or broken library raises
        return False
