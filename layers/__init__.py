"""Mixers and the parts they are made of. A mixer imported here can be named in configs and is held to every law of
`layers.laws` (tests/layers/test_mixer_laws.py). Parts are in `layers.modules`, decoding states in `layers.state`."""

from recollect.configuration import exported_names
from recollect.layers.context import Context, Source
from recollect.layers.mixer import (
    Cursor,
    Mixer,
    MixerConfig,
    MixerOutput,
    Place,
    Traits,
    constrain_activations,
    zero_padding,
)
from recollect.layers.mixers.attention import Attention, SoftmaxAttention, SoftmaxConfig
from recollect.layers.mixers.base_convolution import BaseConvolution, BaseConvolutionMixer
from recollect.layers.mixers.block_selection import BlockSelection, BlockSelectionAttention
from recollect.layers.mixers.comba import Comba, CombaMixer
from recollect.layers.mixers.convolved_attention import ConvolvedAttention
from recollect.layers.mixers.cross_attention import CrossReader, SourceState
from recollect.layers.mixers.delta_net import DeltaNet, DeltaNetMixer, DeltaRuleConfig, DeltaRuleMixer
from recollect.layers.mixers.delta_product import DeltaProduct, DeltaProductMixer
from recollect.layers.mixers.differential_attention import DifferentialAttention, DifferentialSoftmaxAttention
from recollect.layers.mixers.forgetting_attention import ForgettingAttention, ForgettingSoftmaxAttention
from recollect.layers.mixers.gated_attention import GatedAttention, GatedSoftmaxAttention
from recollect.layers.mixers.gated_convolution import GatedConvolution, GatedConvolutionMixer
from recollect.layers.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetMixer
from recollect.layers.mixers.gated_delta_net_2 import GatedDeltaNet2, GatedDeltaNet2Mixer
from recollect.layers.mixers.gated_linear_attention import GatedLinearAttention, GatedLinearAttentionMixer
from recollect.layers.mixers.gated_slot_attention import GatedSlotAttention, GatedSlotAttentionMixer
from recollect.layers.mixers.h3 import H3, H3Mixer
from recollect.layers.mixers.hgrn import HGRN, HGRNMixer
from recollect.layers.mixers.hgrn2 import HGRN2, HGRN2Mixer
from recollect.layers.mixers.hyena import Hyena, HyenaMixer, HyenaState
from recollect.layers.mixers.hyena2 import ExplicitTaps, ExponentialFilter, Hyena2, Hyena2Mixer
from recollect.layers.mixers.injected_attention import InjectedAttention, InjectedAttentionMixer
from recollect.layers.mixers.kimi_delta_attention import KimiDeltaAttention, KimiDeltaAttentionMixer
from recollect.layers.mixers.landmark import Landmark, LandmarkMixer
from recollect.layers.mixers.latent_attention import LatentAttention, MultiHeadLatentAttention
from recollect.layers.mixers.lightning import Lightning, LightningMixer
from recollect.layers.mixers.linear_attention import LinearAttention, LinearAttentionMixer
from recollect.layers.mixers.log_linear_gated_delta_net import LogLinearGatedDeltaNet, LogLinearGatedDeltaNetMixer
from recollect.layers.mixers.log_linear_mamba2 import LogLinearMamba2, LogLinearMamba2Mixer
from recollect.layers.mixers.long_base_convolution import ExplicitFilter, LongBaseConvolutionMixer
from recollect.layers.mixers.mamba import Mamba, MambaMixer
from recollect.layers.mixers.mamba2 import Mamba2, Mamba2Mixer
from recollect.layers.mixers.mamba3 import Mamba3, Mamba3Mixer
from recollect.layers.mixers.mesa_net import MesaNet, MesaNetMixer
from recollect.layers.mixers.min_gru import MinGRU, MinGRUMixer
from recollect.layers.mixers.mixture_of_heads import HeadUse, MixtureOfHeads, MixtureOfHeadsAttention
from recollect.layers.mixers.mlstm import MLSTM, MLSTMMixer
from recollect.layers.mixers.native_sparse_attention import (
    NativeSparseAttention,
    NativeSparseSoftmaxAttention,
)
from recollect.layers.mixers.path_attention import PathAttention, PathMixer
from recollect.layers.mixers.planned_attention import PlannedAttention, PlannedSoftmaxAttention
from recollect.layers.mixers.policy_attention import PolicyAttention
from recollect.layers.mixers.position_invariant_attention import (
    PositionInvariantAttention,
    PositionInvariantAttentionMixer,
)
from recollect.layers.mixers.relative_convolutional_attention import (
    RelativeConvolutionalAttention,
    RelativeConvolutionalMixer,
)
from recollect.layers.mixers.retention import Retention, RetentionMixer
from recollect.layers.mixers.rg_lru import RGLRU, RGLRUMixer
from recollect.layers.mixers.rwkv6 import RWKV6, RWKV6Mixer
from recollect.layers.mixers.rwkv7 import RWKV7, RWKV7Mixer
from recollect.layers.mixers.s4d import S4D, S4DMixer
from recollect.layers.mixers.selective_attention import Selected, SelectiveAttention, SelectiveSoftmaxAttention
from recollect.layers.mixers.short_convolution import DepthwiseConvolution, ShortConvolution
from recollect.layers.mixers.sliding_window import SlidingWindow, SlidingWindowAttention
from recollect.layers.mixers.softmax_streams import SoftmaxStreams
from recollect.layers.mixers.sparse_latent_attention import SparseLatentAttention, SparseMultiHeadLatentAttention
from recollect.layers.mixers.titans import Titans, TitansMixer
from recollect.layers.mixers.ttt_linear import TTTLinear, TTTLinearMixer
from recollect.layers.packing import document_positions, last_valid, previous_segment, token_positions
from recollect.layers.patterns import Pattern, in_pattern
from recollect.layers.recurrent import HeadSizes, RecurrentConfig, RecurrentMixer, RecurrentState, Stream, StreamMixer
from recollect.layers.token_sums import Means, TokenSums

MIXERS = tuple(
    value
    for value in list(globals().values())
    if isinstance(value, type) and issubclass(value, MixerConfig) and value.build is not MixerConfig.build
)
"""Config classes of all mixers."""

__all__ = [*exported_names(globals()), "MIXERS"]
