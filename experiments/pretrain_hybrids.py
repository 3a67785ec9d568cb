"""Published patterns of whole models, as dense models of the sizes of `experiments/pretrain.py`.

Where a published model has a mixture of experts its MLPs are dense here; heads have 128 dimensions and windows those of
the size, unless stated. On an H100 everything has a kernel but RG-LRU's and Mamba's scans and Hyena-2's longer filters,
which XLA computes.
"""

from collections.abc import Callable
from typing import Literal

from recollect.experiments.pretrain_sizes import Size, in_turn
from recollect.layers import (
    RGLRU,
    Attention,
    GatedAttention,
    GatedDeltaNet,
    Hyena2,
    KimiDeltaAttention,
    LatentAttention,
    Lightning,
    Mamba,
    SlidingWindow,
)
from recollect.layers.modules import SGLU, GeGLU, Rotary, SRMSNorm
from recollect.models import LanguageModel, Stage


def samba(of: Size) -> LanguageModel:
    """Returns Samba's (Ren et al. 2024): Mamba and a window in turn."""
    window = SlidingWindow(heads=of.heads, window=of.window, positions=Rotary())
    return in_turn(of, Mamba(), window, depth=round(of.depth * 11 / 12))


def griffin(of: Size) -> LanguageModel:
    """Returns Griffin's (De et al. 2024, section 2): two recurrent blocks to one window with one key head, half of each
    head rotated; GeGLU of three widths, and the embedding times the root of the width (the authors' code)."""
    recurrent = RGLRU(heads=of.width // 256)
    window = SlidingWindow(heads=of.width // 128, key_heads=1, window=of.window, positions=Rotary(fraction=0.5))
    mlp = GeGLU(hidden=3 * of.width - _narrower_at_30m(of))
    return in_turn(of, recurrent, recurrent, window, mlp=mlp, embedding_scale=of.width**0.5)


def jamba(of: Size) -> LanguageModel:
    """Returns Jamba's (Lieber et al. 2024): Mamba, and in every eighth layer, the fifth first, softmax attention
    without positions."""
    mamba, attention = Mamba(), Attention(heads=of.width // 128, key_heads=_key_heads(of))
    layers = (mamba, mamba, mamba, mamba, attention, mamba, mamba, mamba)
    return in_turn(of, *layers, depth=round(of.depth * 21 / 24), narrower=_narrower_at_30m(of))


def qwen3_next(of: Size) -> LanguageModel:
    """Returns three layers of Gated DeltaNet (two heads of values per head of keys) to one of gated attention (8 query
    heads per key head, a quarter of each rotated; published heads have 256 dimensions)."""
    heads = of.width // 128
    delta = GatedDeltaNet(heads=heads, key_heads=heads // 2, key_dim=128, value_dim=128)
    attention = GatedAttention(
        heads=heads,
        key_heads=_key_heads(of),
        positions=Rotary(fraction=0.25),
        query_key_norm=True,
    )
    return in_turn(of, delta, delta, delta, attention)


def kimi_linear(of: Size) -> LanguageModel:
    """Returns three layers of KDA to one of latent attention, whose keys have 64 dimensions of their head and 64 that
    all heads share, not rotated (published 128 + 64)."""
    heads = of.width // 128
    delta = KimiDeltaAttention(heads=heads)
    latent = LatentAttention(heads=heads, rank=of.width // 4, key_dim=64, value_dim=128, rotary_dim=64, positions=None)
    return in_turn(of, delta, delta, delta, latent, narrower=64)


def minimax_01(of: Size) -> LanguageModel:
    """Returns MiniMax-01's (2025): seven layers of lightning attention to one of softmax attention, half of each head
    rotated; norms come before the branches (published: DeepNorm)."""
    heads = of.width // 128
    lightning = Lightning(heads=heads)
    attention = Attention(heads=heads, key_heads=_key_heads(of), positions=Rotary(fraction=0.5))
    return in_turn(of, *(lightning,) * 7, attention, narrower=128)


def striped_hyena_2(of: Size) -> LanguageModel:
    """Returns StripedHyena 2's (Ku et al. 2025; the order and groups of Evo 2 7B): Hyena-2 with short, medium and long
    filters, and after the first three of every seven layers softmax attention with rotary positions."""
    short, medium = (Hyena2(filter=kind, groups=of.width // 16) for kind in ("SE", "MR"))
    long = Hyena2(filter="LI", length=of.length)
    attention = Attention(heads=of.width // 128, positions=Rotary())
    return in_turn(of, short, medium, long, attention, short, medium, long)


def transnormer(of: Size, decay: Literal["code", "paper"] = "code") -> LanguageModel:
    """Returns TransNormerLLM's (Qin et al. 2023, section 3): norms without gains, gated MLPs without an activation,
    LRPE-d in the first layer, decays alone in the others, the embedding times the root of the width (their code)."""
    layers = [
        Stage(pattern=(Lightning(heads=of.width // 128, form="transnormer", decay=decay, lrpe=first),), repeats=repeats)
        for first, repeats in ((True, 1), (False, of.depth - 1))
    ]
    return LanguageModel(
        width=of.width,
        stages=tuple(layers),
        norm=SRMSNorm(),
        mlp=SGLU(hidden=of.hidden - (0 if of.width == 1024 else 128)),
        embedding_scale=of.width**0.5,
    )


def _key_heads(of: Size) -> int:
    """Returns one key head per eight heads of 128 dimensions."""
    return max(1, of.width // 1024)


def _narrower_at_30m(of: Size) -> int:
    """Returns by how many hidden units the MLPs at width 512 are narrower."""
    return 128 if of.width == 512 else 0


HYBRIDS: dict[str, Callable[[Size], LanguageModel]] = {
    "samba": samba,
    "griffin": griffin,
    "jamba": jamba,
    "qwen3_next": qwen3_next,
    "kimi_linear": kimi_linear,
    "minimax_01": minimax_01,
    "striped_hyena_2": striped_hyena_2,
    "transnormer": transnormer,
}
"""Pattern -> its model at a size."""
