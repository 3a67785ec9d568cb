"""linear_recurrence on the kernels of gpu.py."""

from recollect.pallas_kernels.linear_recurrence import gpu
from recollect.pallas_kernels.linear_recurrence.backends import on_kernels

linear_recurrence, refuses = on_kernels("gpu", gpu, gpu.walk)  # type: ignore[arg-type]
