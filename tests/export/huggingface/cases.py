"""A model of every published layout that an export writes."""

from typing import Any

import numpy as np

from recollect.export.huggingface.tensors import fixed_values
from recollect.layers import (
    HGRN2,
    RGLRU,
    RWKV7,
    Attention,
    BaseConvolution,
    DeltaNet,
    DifferentialAttention,
    GatedAttention,
    GatedConvolution,
    GatedDeltaNet,
    GatedLinearAttention,
    Hyena,
    KimiDeltaAttention,
    Landmark,
    LatentAttention,
    Lightning,
    LinearAttention,
    Mamba,
    Mamba2,
    MixtureOfHeads,
    Retention,
    ShortConvolution,
    SlidingWindow,
)
from recollect.layers.modules import (
    GELU,
    GeGLU,
    Hedgehog,
    Identity,
    LayerNorm,
    LearnedPositions,
    RMSNorm,
    Rotary,
    SquaredReLU,
    SwiGLU,
)
from recollect.models import Canon, FunctionalModel, LanguageModel, Stage, flatten, nest, repeat


def _rotary(*mixers, depth=2, **fields):
    settings = {"width": 32, "mlp": SwiGLU(hidden=48)} | fields
    return LanguageModel(stages=repeat(*mixers, depth=depth), **settings)


FULL = Attention(heads=4, positions=Rotary())
NORMED = {"heads": 4, "key_heads": 2, "positions": Rotary(), "query_key_norm": True}
MODELS = {
    "llama": _rotary(FULL),
    "llama, biases, grouped, untied, head_dim": _rotary(
        Attention(heads=4, key_heads=2, head_dim=16, positions=Rotary(base=500.0), bias=True),
        mlp=SwiGLU(hidden=48, bias=True),
        tied=False,
    ),
    "llama, two stages": LanguageModel(
        width=32, mlp=SwiGLU(hidden=48), stages=(Stage(pattern=(FULL,), repeats=2), Stage(pattern=(FULL, FULL)))
    ),
    "qwen3": _rotary(Attention(**NORMED)),
    "qwen3, windows in some layers, biases": _rotary(
        SlidingWindow(window=6, bias=True, **NORMED), Attention(bias=True, **NORMED), tied=False
    ),
    "mistral": _rotary(SlidingWindow(window=7, heads=4, key_heads=2, positions=Rotary()), tied=False),
    "phi3": _rotary(Attention(heads=4, positions=Rotary(fraction=0.5))),
    "phi3, windows, grouped": _rotary(
        SlidingWindow(window=5, heads=4, key_heads=2, positions=Rotary(fraction=0.5)), tied=False
    ),
    "gpt2": LanguageModel(
        width=32,
        stages=repeat(Attention(heads=4, bias=True), depth=2),
        norm=LayerNorm(),
        mlp=GELU(bias=True),
        positions=LearnedPositions(maximum=64),
    ),
    "gpt2, untied": LanguageModel(
        width=32,
        stages=repeat(Attention(heads=2, bias=True), depth=3),
        norm=LayerNorm(epsilon=1e-4),
        mlp=GELU(hidden=40, bias=True),
        positions=LearnedPositions(maximum=64),
        tied=False,
    ),
    "mamba": LanguageModel(width=32, stages=repeat(Mamba(state=8), depth=2)),
    "mamba2": LanguageModel(
        width=32,
        stages=repeat(Mamba2(heads=4, key_dim=8), depth=2),
        norm=RMSNorm(epsilon=1e-5),
    ),
    "qwen3_5_text": _rotary(
        GatedDeltaNet(heads=4, key_heads=2, key_dim=8, value_dim=6, norm_epsilon=1e-6),
        GatedAttention(**{**NORMED, "positions": Rotary(fraction=0.25)}),
        depth=3,
    ),
    "kimi_linear": _rotary(
        KimiDeltaAttention(heads=2, key_dim=8, value_dim=8, gate_bias=False),
        LatentAttention(heads=4, rank=12, key_dim=8, value_dim=6, rotary_dim=4, positions=None),
        depth=3,
        norm=RMSNorm(epsilon=1e-5),
        tied=False,
    ),
    "kimi_linear, latent queries": _rotary(
        KimiDeltaAttention(heads=4, gate_bias=False),
        LatentAttention(heads=2, rank=12, query_rank=10, rotary_dim=4, positions=None),
        norm=RMSNorm(epsilon=1e-5),
    ),
    "recurrent_gemma": LanguageModel(
        width=64,
        stages=repeat(
            RGLRU(heads=4),
            SlidingWindow(window=7, heads=4, key_heads=2, positions=Rotary(fraction=0.5), bias=True),
            depth=3,
        ),
        mlp=GeGLU(hidden=40, bias=True),
    ),
    "minimax": _rotary(
        Lightning(heads=4),
        Attention(heads=4, key_heads=2, positions=Rotary(base=500.0)),
        depth=3,
        residual="normalised",
    ),
    "lfm2": _rotary(
        GatedConvolution(kernel=3, expansion=2, bias=False, activation="none", input_gate=True),
        Attention(**NORMED),
        depth=3,
    ),
    "diffllama": _rotary(
        DifferentialAttention(heads=4, key_heads=2, head_dim=16, positions=Rotary(), gain=False),
        depth=3,
        norm=RMSNorm(epsilon=1e-5),
    ),
    "diffllama, biases": _rotary(
        DifferentialAttention(heads=2, positions=Rotary(), bias=True, gain=False), norm=RMSNorm(epsilon=1e-5)
    ),
    "gpt_oss": _rotary(
        SlidingWindow(window=6, heads=4, key_heads=2, positions=Rotary(), bias=True, sinks="learned"),
        mlp=SwiGLU(hidden=48, bias=True),
        tied=False,
    ),
}

"""Models as classes of transformers."""

GGUF = {name: MODELS[name] for name in ("llama, biases, grouped, untied, head_dim", "qwen3", "mamba", "mamba2")} | {
    "qwen35": _rotary(
        GatedDeltaNet(heads=4, key_heads=2, key_dim=8, value_dim=8, norm_epsilon=1e-6),
        GatedAttention(**{**NORMED, "positions": Rotary(fraction=0.5)}),
        depth=4,
    ),
    "kimi-linear": _rotary(
        KimiDeltaAttention(heads=4, key_dim=8, value_dim=8, gate_bias=False),
        LatentAttention(heads=4, rank=12, key_dim=8, value_dim=6, rotary_dim=4, positions=None),
        depth=3,
        norm=RMSNorm(epsilon=1e-5),
    ),
}
"""Models as architectures of llama.cpp."""

EXACT = {"norm": RMSNorm(epsilon=1e-5)}
FLASH = {
    "gla": _rotary(GatedLinearAttention(heads=2, kernel=3), **EXACT),
    "retnet": _rotary(Retention(heads=2), tied=False, **EXACT),
    "delta_net": _rotary(DeltaNet(gate=True), Attention(heads=4, key_heads=2, positions=Rotary()), **EXACT),
    "gated_deltanet": _rotary(
        GatedDeltaNet(heads=4, key_heads=2, key_dim=6, value_dim=9, norm_epsilon=1e-4, negative_eigenvalues=True),
        SlidingWindow(window=4, heads=4, positions=Rotary(base=500.0)),
        norm=RMSNorm(epsilon=1e-4),
    ),
    "kda": _rotary(KimiDeltaAttention(key_dim=6, value_dim=8, bound=5.0), **EXACT),
    "hgrn2": _rotary(HGRN2(lower_bounds=False), **EXACT),
    "rwkv7": LanguageModel(
        width=32,
        stages=(Stage(pattern=(RWKV7(),)), Stage(pattern=(RWKV7(value_residual=True),), repeats=2)),
        norm=LayerNorm(),
        mlp=SquaredReLU(hidden=48),
    ),
}
"""Models of flash-linear-attention."""

CODE = {
    "code, based": _rotary(
        GatedConvolution(expansion=2),
        LinearAttention(heads=4, feature_dim=4),
        SlidingWindow(window=5, heads=4, key_heads=2, positions=Rotary(layout="interleaved")),
        depth=3,
    ),
    "code, delta rules": LanguageModel(
        width=32,
        stages=repeat(
            DeltaNet(heads=4, gate=True),
            GatedDeltaNet(heads=4, key_heads=2, key_dim=6, value_dim=5, negative_eigenvalues=True),
            KimiDeltaAttention(heads=2, kernel=None),
            depth=3,
        ),
    ),
    "code, decays": _rotary(
        GatedLinearAttention(heads=4), Retention(heads=4), Mamba2(heads=4, key_heads=2, key_dim=6), depth=3, tied=False
    ),
    "code, heads": LanguageModel(
        width=32,
        stages=repeat(
            MixtureOfHeads(heads=8, shared=2, active=3),
            BaseConvolution(),
            SlidingWindow(window=4, heads=4, sinks="first", first=2),
            GatedAttention(heads=4, gate="head", query_key_norm=True),
            depth=4,
        ),
        norm=LayerNorm(),
        mlp=GELU(bias=True),
        positions=LearnedPositions(maximum=64),
    ),
    "code, features": _rotary(
        LinearAttention(heads=4, feature_map=Hedgehog(), positions=Rotary()),
        LinearAttention(heads=4, feature_map=Identity(), normalise=False, decay="retnet", output_norm=True),
        ShortConvolution(kernel=3, bias=True, activation="silu"),
        depth=3,
        mlp=None,
    ),
    "code, hyena": _rotary(
        Hyena(maximum_length=64, filter_order=8, time="last", trains_times=True),
        Hyena(maximum_length=48, filter_order=8, heads=2, kernel=4),
        depth=2,
        mlp=SquaredReLU(hidden=48),
    ),
    "code, landmark": _rotary(
        BaseConvolution(),
        Landmark(heads=4, key_heads=2, block=4, positions=Rotary()),
        Landmark(heads=4, block=4, retrieve=2, positions=Rotary(), bias=True),
        SlidingWindow(window=6, heads=4, positions=Rotary()),
        depth=4,
    ),
    "code, canon": _rotary(
        Attention(heads=4, key_heads=2, positions=Rotary(), bias=True),
        GatedDeltaNet(heads=4),
        BaseConvolution(),
        depth=3,
        canon=Canon(),
    ),
}
"""Models as code beside the weights."""


def parameters(config: LanguageModel) -> dict[str, Any]:
    """Parameters of a model of 257 tokens, large enough that every path matters; constants as its layers have them."""
    rng = np.random.default_rng(0)
    shapes = flatten(FunctionalModel(config, 257).abstract_params())
    drawn = {name: 0.2 * rng.normal(size=leaf.shape) + name.endswith("gain") for name, leaf in shapes.items()}
    drawn |= fixed_values(config, 257)
    return nest({tuple(name.split(".")): array.astype(np.float32) for name, array in drawn.items()})
