"""linear_recurrence on the kernels of tpu.py."""

from recollect.pallas_kernels.linear_recurrence import tpu
from recollect.pallas_kernels.linear_recurrence.backends import on_kernels

linear_recurrence, refuses = on_kernels("tpu", tpu)  # type: ignore[arg-type]
