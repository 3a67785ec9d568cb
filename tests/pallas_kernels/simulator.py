"""The simulator of GPU kernels, as tests see it: whether it saw a race, and its state forgotten."""

from __future__ import annotations

import os


def races_found() -> bool:
    """Returns whether the kernels simulated last raced: the simulator only prints it, and the flag is internal.

    On a device (RECOLLECT_ON_DEVICE) nothing is simulated, so none is ever found.
    """
    if os.environ.get("RECOLLECT_ON_DEVICE"):
        return False
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call.get_races().races_found


def reset() -> None:
    """Forgets what the simulator holds; needed after an exception inside a kernel."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()
