"""linear_recurrence on the kernels of tpu.py."""

from recollect.pallas_kernels.linear_recurrence.backends import on_kernels
from recollect.pallas_kernels.linear_recurrence.tpu import KERNELS

linear_recurrence, refuses = on_kernels("tpu", KERNELS)
