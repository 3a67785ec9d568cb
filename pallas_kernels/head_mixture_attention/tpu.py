"""head_mixture_attention on the scheduled attention kernels for TPUs."""

from recollect.pallas_kernels.head_mixture_attention.scheduled import on_kernels
from recollect.pallas_kernels.scheduled_attention import tpu

head_mixture_attention, refuses = on_kernels(tpu)
