"""Parts that mixers and models call: linear maps, norms, positions, gates, decays, selectors, convolutions, MLPs."""

from recollect.configuration import exported_names
from recollect.layers.modules.block_compression import BlockCompression
from recollect.layers.modules.decays import (
    BoundedDecay,
    LogSigmoidDecay,
    LowerBound,
    StepDecay,
    alibi_slopes,
    inverse_softplus,
    retnet_log_decays,
    spread_uniform,
)
from recollect.layers.modules.feature_maps import (
    EluPlusOne,
    Exp,
    FeatureMap,
    Hedgehog,
    HedgehogFeatures,
    Identity,
    Pointwise,
    Relu,
    Taylor,
)
from recollect.layers.modules.gates import (
    BlockDiagonal,
    HeadNormalization,
    Interpolation,
    LowRank,
    OutputGate,
    Skip,
    Strength,
    in_fp32,
    unit,
)
from recollect.layers.modules.implicit_filter import ReluFilter, SineFilter, embed_times, times
from recollect.layers.modules.initial_values import orthogonal, torch_uniform
from recollect.layers.modules.initialisation import ACTIVE_DORMANT, FLA, GLA, ZOOLOGY, Initialisation
from recollect.layers.modules.layer_norm import LayerNorm, LayerNormalization, NormConfig
from recollect.layers.modules.lightning_indexer import Indexer, LightningIndexer
from recollect.layers.modules.linear import Linear, merge_heads, normal, output_init, parameter, split_heads
from recollect.layers.modules.mask_designs import MaskDesign, PrefixLM
from recollect.layers.modules.mlp import (
    GELU,
    SGLU,
    GeGLU,
    GeGLUNetwork,
    GELUNetwork,
    MlpConfig,
    PassThrough,
    PassThroughNetwork,
    SGLUNetwork,
    SquaredReLU,
    SquaredReLUNetwork,
    SwiGLU,
    SwiGLUNetwork,
)
from recollect.layers.modules.norms import RMSNorm, RMSNormalization
from recollect.layers.modules.percept_masks import Bidirectional, Composite, Concentric, ModalityMutual, Parallel
from recollect.layers.modules.positions import LRPE, LearnedPositions, Placement, PositionsConfig, PositionTable, Rotary
from recollect.layers.modules.rotary_scaling import LinearScaling, Llama3Scaling, NTKScaling, RotaryScaling, YaRN
from recollect.layers.modules.score_biases import Alibi, BucketBias, DistanceBias, RelativeBias, ScoreBias
from recollect.layers.modules.selectors import LandmarkTokens, MeanBlocks, Selector, SelectorModule
from recollect.layers.modules.short_convolution import CausalConvolution
from recollect.layers.modules.simple_rms_norm import SimpleRMSNormalization, SRMSNorm
from recollect.layers.modules.stabiliser import running_maximum
from recollect.layers.modules.state_space import DiagonalStateSpace

__all__ = exported_names(globals())
