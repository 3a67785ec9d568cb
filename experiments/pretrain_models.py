"""Models of `experiments/pretrain.py`, by mixer pattern and size.

Published shapes: Based at 360M and 1.3B with its layer map, and attention at 360M (Arora et al. 2024, reference
configurations); mixture of heads at 125m (Jin et al. 2024, appendix B.3: 12 layers of width 768, 2,048 hidden units, 12
heads); Mamba-2 from 125m on (Dao & Gu 2024: 24 or 48 layers without MLPs). The others have the attention model's MLPs
and depth, with 128 fewer hidden units or fewer layers beside larger mixers, so that parameters outside the embedding
agree within 10% (tests/experiments/test_pretrain.py holds them to it). Initialisation is the layers' own: N(0, 0.02),
and N(0, 0.02 / sqrt(2 layers)) into the residual stream, as in the references, unless a mixer's file says otherwise.

Heads of the recurrences are as published, but within what the kernels for an H100 hold: Gated DeltaNet has keys of at
most 128 dimensions and values twice that (published 256 and 512), GLA 128 and 256 at every size (published at 1.3B 256
and 512). Patterns of whole models stand in pretrain_hybrids.py.
"""

import math
from collections.abc import Callable

from recollect.experiments.pretrain_hybrids import HYBRIDS
from recollect.experiments.pretrain_sizes import Size, in_turn
from recollect.layers import (
    RWKV7,
    Attention,
    DeltaNet,
    GatedConvolution,
    GatedDeltaNet,
    GatedLinearAttention,
    Hyena,
    KimiDeltaAttention,
    Landmark,
    LinearAttention,
    Mamba2,
    MixerConfig,
    MixtureOfHeads,
    SlidingWindow,
)
from recollect.layers.modules import RMSNorm, Rotary, SwiGLU, Taylor
from recollect.models import LanguageModel, Stage, repeat

HALF = Rotary(fraction=0.5)
"""Positions of the attention model that Based is compared with."""


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


def rwkv7(of: Size) -> LanguageModel:
    """Returns RWKV-7's time mixing, where later layers mix in the values of the first."""
    first, later = (RWKV7(heads=of.width // 64, value_residual=mixes) for mixes in (False, True))
    stages = (Stage(pattern=(first,)), Stage(pattern=(later,), repeats=of.depth - 1))
    return LanguageModel(width=of.width, stages=stages, mlp=SwiGLU(hidden=of.hidden - 128))


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
    "rwkv7": rwkv7,
    **HYBRIDS,
}
"""Pattern -> its model at a size."""
