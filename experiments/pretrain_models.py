"""Models of `experiments/pretrain.py`, by mixer pattern and size.

Published shapes: Based at 360M and 1.3B with its layer map, and attention at 360M (Arora et al. 2024, reference
configurations); mixture of heads at 125m (Jin et al. 2024, appendix B.3: 12 layers of width 768, 2,048 hidden units, 12
heads); Mamba-2 from 125m on (Dao & Gu 2024: 24 or 48 layers without MLPs). The others have the attention model's MLPs
and depth, with 128 fewer hidden units or fewer layers beside larger mixers, so that parameters outside the embedding
agree within 10% (tests/experiments/test_pretrain.py holds them to it). Initialisation is the layers' own: N(0, 0.02),
and N(0, 0.02 / sqrt(2 layers)) into the residual stream, as in the references, unless a mixer's file says otherwise.

Heads of the recurrences are as published, but within what the kernels for an H100 hold: Gated DeltaNet has keys of at
most 128 dimensions and values twice that (published 256 and 512), GLA 128 and 256 at every size (published at 1.3B 256
and 512). Both hybrids are the patterns of the published models in dense models of these sizes, one softmax layer in
four, with heads of 128 dimensions (published in Qwen3-Next 256; in Kimi Linear keys of 128 + 64).
"""

import dataclasses
import math
from collections.abc import Callable

from recollect.layers import (
    RWKV7,
    Attention,
    DeltaNet,
    GatedAttention,
    GatedConvolution,
    GatedDeltaNet,
    GatedLinearAttention,
    Hyena,
    KimiDeltaAttention,
    Landmark,
    LatentAttention,
    LinearAttention,
    Mamba2,
    MixerConfig,
    MixtureOfHeads,
    SlidingWindow,
)
from recollect.layers.modules import RMSNorm, Rotary, SwiGLU, Taylor
from recollect.models import LanguageModel, Stage, repeat


@dataclasses.dataclass(frozen=True)
class BasedLayers:
    """Based's shape at a size: `window` keys are seen; `layers` are patterns of c, t and w and how often each
    repeats."""

    width: int
    heads: int
    window: int
    layers: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Size:
    """The attention model of one size, and what is common to all mixers there.

    Attributes:
      hidden: of its SwiGLU, about 8/3 widths.
      length: tokens per row.
      rows, pieces: rows per step, and microbatches that they are split into to fit one device.
      steps: 20,000 steps of 256 rows of 2,048 tokens are 10 billion tokens.
    """

    width: int
    heads: int
    depth: int
    hidden: int
    based: BasedLayers
    length: int = 2048
    window: int = 512
    rows: int = 256
    pieces: int = 1
    steps: int = 20_000


SIZES = {
    "30m": Size(512, 8, 10, 1280, BasedLayers(512, 8, 65, {"ctwcc": 2}), length=512, window=128, rows=8, steps=1000),
    "125m": Size(768, 12, 12, 2048, BasedLayers(768, 12, 129, {"ctwcc": 2, "ctw": 1}), pieces=4),
    "360m": Size(1024, 16, 24, 2816, BasedLayers(1024, 16, 129, {"ctwcc": 5, "cc": 1}), pieces=8),
    "1b": Size(2048, 16, 24, 5504, BasedLayers(1792, 16, 129, {"ctwcc": 5, "cctwcc": 1, "cctwc": 1}), pieces=32),
}

CURVES = Size(128, 4, 6, 336, BasedLayers(128, 4, 33, {"ctwccc": 1}), length=512, window=64, rows=8, steps=400)
"""The models of `pretrain.curves`."""

HALF = Rotary(fraction=0.5)
"""Positions of the attention model that Based is compared with."""


def in_turn(of: Size, *mixers: MixerConfig, depth: int | None = None, narrower: int = 0) -> LanguageModel:
    """Returns a model whose layers cycle through the mixers, with MLPs of `narrower` fewer hidden units."""
    mlp = SwiGLU(hidden=of.hidden - narrower)
    return LanguageModel(width=of.width, stages=repeat(*mixers, depth=depth or of.depth), mlp=mlp)


def based(of: Size) -> LanguageModel:
    """Returns Based's model: gated convolutions (c), Taylor attention of 16 features (t) and windows (w); epsilons are
    the published ones."""
    shape = of.based
    mixers: dict[str, MixerConfig] = {
        "c": GatedConvolution(kernel=3, expansion=4),
        "t": LinearAttention(heads=shape.heads, feature_dim=16, feature_map=Taylor(), epsilon=1e-12),
        "w": SlidingWindow(heads=shape.heads, window=shape.window, positions=Rotary()),
    }
    stages = tuple(
        Stage(pattern=tuple(mixers[letter] for letter in letters), repeats=repeats)
        for letters, repeats in shape.layers.items()
    )
    return LanguageModel(
        width=shape.width, stages=stages, norm=RMSNorm(epsilon=1e-5), mlp=SwiGLU(hidden=2 * shape.width)
    )


def gated_delta_net(of: Size) -> LanguageModel:
    """Returns Gated DeltaNet's: keys of all heads take 3/4 of the width, values twice that; fewer layers make up for
    it (published at 1.3B: 21)."""
    heads = 6 * max(1, of.width // 1024)
    key_dim = 3 * of.width // (4 * heads)
    mixer = GatedDeltaNet(heads=heads, key_dim=key_dim, value_dim=2 * key_dim)
    return in_turn(of, mixer, depth=math.ceil(of.depth * 21 / 24), narrower=128)


def mamba2(of: Size) -> LanguageModel:
    """Returns Mamba-2's: a mixer in the place of each mixer and of each MLP (two fewer at 30M, where B and C are large
    beside the width)."""
    mixer = Mamba2(heads=2 * of.width // 64, key_dim=128)
    return LanguageModel(width=of.width, stages=repeat(mixer, depth=18 if of.depth == 10 else 2 * of.depth), mlp=None)


def qwen3_next(of: Size) -> LanguageModel:
    """Returns three layers of Gated DeltaNet (two heads of values per head of keys) to one of gated attention (8 query
    heads per key head, a quarter of each rotated)."""
    heads = of.width // 128
    delta = GatedDeltaNet(heads=heads, key_heads=heads // 2, key_dim=128, value_dim=128)
    attention = GatedAttention(
        heads=heads,
        key_heads=max(1, heads // 8),
        head_dim=128,
        positions=Rotary(fraction=0.25),
        query_key_norm=True,
    )
    return in_turn(of, delta, delta, delta, attention)


def kimi_linear(of: Size) -> LanguageModel:
    """Returns three layers of KDA to one of latent attention, whose keys have 64 dimensions of their head and 64 that
    all heads share, not rotated."""
    heads = of.width // 128
    delta = KimiDeltaAttention(heads=heads)
    latent = LatentAttention(heads=heads, rank=of.width // 4, key_dim=64, value_dim=128, rotary_dim=64, positions=None)
    return in_turn(of, delta, delta, delta, latent, narrower=128)


MODELS: dict[str, Callable[[Size], LanguageModel]] = {
    "attention": lambda of: in_turn(of, Attention(heads=of.heads, positions=HALF)),
    "based": based,
    "window": lambda of: in_turn(of, SlidingWindow(heads=of.heads, window=of.window, positions=HALF)),
    # 63 tokens and their landmark fill the tile of 64 of the authors' and of our kernels; they pair neighbouring
    # dimensions.
    "landmark": lambda of: in_turn(of, Landmark(heads=of.heads, block=63, positions=Rotary(layout="interleaved"))),
    # Half of the heads shared and half of the routed ones active: 75 % in all, the authors' LLaMA3-8B.
    "mixture_of_heads": lambda of: in_turn(
        of,
        MixtureOfHeads(heads=of.heads, shared=of.heads // 2, active=of.heads // 4, gates="ones", positions=HALF),
    ),
    "hyena": lambda of: in_turn(of, Hyena(maximum_length=of.length, filter_order=min(64, of.width // 8))),
    "delta_net": lambda of: in_turn(of, DeltaNet(heads=of.width // 128)),
    "gated_delta_net": gated_delta_net,
    "kimi_delta_attention": lambda of: in_turn(of, KimiDeltaAttention(heads=of.width // 128), narrower=128),
    "gla": lambda of: in_turn(of, GatedLinearAttention(heads=of.width // 256)),
    "mamba2": mamba2,
    "rwkv7": lambda of: in_turn(of, RWKV7(heads=of.width // 64), narrower=128),
    "qwen3_next": qwen3_next,
    "kimi_linear": kimi_linear,
}
"""Pattern -> its model at a size."""
