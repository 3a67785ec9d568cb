"""linear_recurrence on the kernels of gpu.py."""

from recollect.pallas_kernels.linear_recurrence.backends import on_kernels
from recollect.pallas_kernels.linear_recurrence.gpu import KERNELS

linear_recurrence, refuses = on_kernels("gpu", KERNELS)
