"""Operations on arrays, each a folder with a public function, a naive reference and faster backends. Knows nothing of
Flax or configs.

The functions below are the public API; each names its backends in `BACKENDS`, of which `dispatch` imports the one that
a call runs on.
"""

# Tuning adds to what jax keeps compiled programs by: imported while the first program is traced, it would have every
# program compiled once more.
from recollect.pallas_kernels import tuning as tuning
from recollect.pallas_kernels.gated_convolution import long_convolution, short_convolution, short_convolution_step
from recollect.pallas_kernels.head_mixture_attention import head_mixture_attention
from recollect.pallas_kernels.landmark_attention import landmark_attention, retrieve_blocks
from recollect.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from recollect.pallas_kernels.linear_recurrence import (
    Recurrence,
    linear_recurrence,
    linear_recurrence_step,
    run_recurrence,
)
from recollect.pallas_kernels.linear_scan import linear_scan
from recollect.pallas_kernels.modal_recurrence import modal_recurrence
from recollect.pallas_kernels.selective_scan import selective_scan
from recollect.pallas_kernels.softmax_attention import merge, softmax_attention
from recollect.pallas_kernels.taylor_attention import taylor_attention, taylor_attention_step

__all__ = [
    "Recurrence",
    "head_mixture_attention",
    "landmark_attention",
    "linear_cross_entropy",
    "linear_recurrence",
    "linear_recurrence_step",
    "linear_scan",
    "long_convolution",
    "merge",
    "modal_recurrence",
    "retrieve_blocks",
    "run_recurrence",
    "selective_scan",
    "short_convolution",
    "short_convolution_step",
    "softmax_attention",
    "taylor_attention",
    "taylor_attention_step",
]
