"""softmax_attention on the scheduled attention kernels for TPUs."""

from recollect.pallas_kernels.scheduled_attention import tpu
from recollect.pallas_kernels.softmax_attention.scheduled import on_kernels

softmax_attention, refuses = on_kernels(tpu, "softmax_attention.tpu_tiles")
