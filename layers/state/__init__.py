"""What a mixer keeps while it decodes: key-value caches, cache policies, states of convolutions."""

from recollect.configuration import exported_names
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes, Footprint, Full, NewTokens, Reader, View
from recollect.layers.state.capacity import (
    BoundedState,
    bounded_parts,
    check_capacity,
    check_positions,
    overfull,
)
from recollect.layers.state.convolution import ConvolutionState
from recollect.layers.state.eviction import EvictionConfig, HeavyHitters, RecentTokens, Slots, StreamingLLM
from recollect.layers.state.hip import HiP, SearchedSlots
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.layers.state.long_convolution import LongConvolutionCache
from recollect.layers.state.long_heads import ChunkedSlots, LongHeads
from recollect.layers.state.policy_state import PolicyState
from recollect.layers.state.quantised import Codes, Quantised, QuantisedSlots
from recollect.layers.state.reads import Reads, cache_reads, mass_kept, measured_reads, measuring, report
from recollect.layers.state.recycled import Recycled, RecycledSlots
from recollect.layers.state.snap_kv import PromptSlots, PyramidKV, SnapKV
from recollect.layers.state.task_kv import SplitSlots, TaskKV
from recollect.layers.state.window_cache import WindowCache

__all__ = exported_names(globals())
