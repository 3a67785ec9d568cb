"""landmark_attention on the scheduled attention kernels for GPUs."""

from recollect.pallas_kernels.landmark_attention.kernels import on_kernels
from recollect.pallas_kernels.scheduled_attention import gpu

landmark_attention, refuses = on_kernels(gpu)
