"""softmax_attention on the scheduled attention kernels for GPUs."""

from recollect.pallas_kernels.scheduled_attention import gpu
from recollect.pallas_kernels.softmax_attention.scheduled import on_kernels

softmax_attention, refuses = on_kernels(gpu, "softmax_attention.gpu_tiles")
