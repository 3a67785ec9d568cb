"""Models, optimizers and budgets of `experiments/pretrain.py`, by mixer and size.

Published shapes: Based at 360M and 1.3B with its layer map, and attention at 360M (Arora et al. 2024, reference
configurations); mixture of heads at 125m (Jin et al. 2024, appendix B.3: 12 layers of width 768, 2,048 hidden units, 12
heads). The others have the attention model's shape at that size, so that parameters outside the embedding agree within
10% (tests/experiments/test_pretrain.py holds them to it). Initialisation is the layers' own: N(0, 0.02), and N(0, 0.02
/ sqrt(2 layers)) into the residual stream, as in the references.
"""

import dataclasses
from typing import Any

import chz

from recollect.configuration import UserError
from recollect.data.text.dataset import Text
from recollect.layers import (
    Attention,
    GatedConvolution,
    Hyena,
    Landmark,
    LinearAttention,
    MixerConfig,
    MixtureOfHeads,
    SlidingWindow,
)
from recollect.layers.modules import RMSNorm, Rotary, SwiGLU, Taylor
from recollect.models import LanguageModel, Stage, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW, GroupRate


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
    length: int
    window: int
    rows: int
    pieces: int
    steps: int


SIZES = {
    "30m": Size(width=512, heads=8, depth=10, hidden=1280, length=512, window=128, rows=8, pieces=1, steps=1000),
    "125m": Size(width=768, heads=12, depth=12, hidden=2048, length=2048, window=512, rows=256, pieces=4, steps=20_000),
    "360m": Size(
        width=1024, heads=16, depth=24, hidden=2816, length=2048, window=512, rows=256, pieces=8, steps=20_000
    ),
    "1b": Size(width=2048, heads=16, depth=24, hidden=5504, length=2048, window=512, rows=256, pieces=32, steps=20_000),
}

CURVES = Size(width=128, heads=4, depth=6, hidden=336, length=512, window=64, rows=8, pieces=1, steps=400)
"""The models of `pretrain.curves`."""

BASED = {
    "30m": (512, 8, 65, {"ctwcc": 2}),
    "125m": (768, 12, 129, {"ctwcc": 2, "ctw": 1}),
    "360m": (1024, 16, 129, {"ctwcc": 5, "cc": 1}),
    "1b": (1792, 16, 129, {"ctwcc": 5, "cctwcc": 1, "cctwc": 1}),
    "curves": (CURVES.width, CURVES.heads, 33, {"ctwccc": 1}),
}
"""Based by size: width, heads, keys that a window sees, and the layers: patterns and how often each repeats."""

PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    ("mixture_of_heads", "125m"): {"learning_rate": 3e-4, "warmup": 2000},
    ("mixture_of_heads", "1b"): {"learning_rate": 5e-4, "warmup": 500},
    # One cycle to 2e-3 and down to a fifth, warm-up of 2 %, hardly any decay, no clipping.
    ("landmark", "125m"): {
        "learning_rate": 2e-3,
        "final_fraction": 0.2,
        "warmup": 400,
        "weight_decay": 1e-3,
        "clip": None,
    },
}
"""What was published for a mixer at a size, where it differs from Based's reference setting."""

PATTERNS = ("attention", "based", "window", "landmark", "mixture_of_heads", "hyena")


def experiment(pattern: str, size: str) -> Experiment:
    """Returns `pretrain.PATTERN_SIZE`.

    Raises:
      UserError: there is no such pattern or size.
    """
    if pattern not in PATTERNS or size not in SIZES:
        raise UserError(f"pretrain.{pattern}_{size}: patterns are {', '.join(PATTERNS)}, sizes {', '.join(SIZES)}")
    of = SIZES[size]
    small = size == "30m"
    model = _based(size) if pattern == "based" else _uniform(_mixers(of)[pattern], of)
    if not small:
        # On an H100 "dots" moves a quarter less through main memory than keeping everything ("none"), by `describe
        # --target h100`.
        model = chz.replace(model, dtype="bfloat16", remat="full" if size == "1b" else "dots")
    return Experiment(
        name=f"pretrain.{pattern}_{size}",
        model=model,
        data=Text(source="stdlib", length=of.length, held_out_bytes=32_768 if small else 10_000_000),
        optimizer=_optimizer(pattern, size),
        run=Run(
            steps=of.steps,
            batch_size=of.rows,
            accumulate=of.pieces,
            steps_per_call=5,
            log_every=10 if small else 20,
            evaluate_every=100 if small else 1000,
            checkpoint_every=100 if small else 1000,
            sample_every=500 if small else 2000,
            precision="default",
        ),
    )


def small(label: str, mixer: MixerConfig | None) -> Experiment:
    """Returns a model of 1.2M parameters: 6 layers of width 128, 1.6 million bytes of the standard library in 400
    steps; `mixer` None is Based's pattern."""
    rates = (GroupRate(group="filter", factor=1 / 3),) if isinstance(mixer, Hyena) else ()
    return Experiment(
        name=label,
        model=_based("curves") if mixer is None else _uniform(mixer, CURVES),
        data=Text(source="stdlib", length=CURVES.length, held_out_bytes=32_768),
        optimizer=AdamW(
            learning_rate=3e-3, final_fraction=0.1, warmup=50, weight_decay=0.1, beta2=0.95, clip=1.0, groups=rates
        ),
        run=Run(
            steps=CURVES.steps,
            batch_size=CURVES.rows,
            steps_per_call=10,
            log_every=20,
            evaluate_every=40,
            checkpoint_every=200,
            precision="default",
        ),
    )


def small_of(pattern: str) -> Experiment:
    """Returns one pattern's small model, `pretrain.PATTERN`."""
    return small(f"pretrain.{pattern}", _mixers(CURVES).get(pattern))


def _uniform(mixer: MixerConfig, of: Size) -> LanguageModel:
    """Returns a model with the same mixer in every layer."""
    return LanguageModel(width=of.width, stages=repeat(mixer, depth=of.depth), mlp=SwiGLU(hidden=of.hidden))


def _mixers(of: Size) -> dict[str, MixerConfig]:
    """Returns the mixer of each pattern but Based's, at one size."""
    half = Rotary(fraction=0.5)  # as the attention model that Based is compared with
    return {
        "attention": Attention(heads=of.heads, positions=half),
        "window": SlidingWindow(heads=of.heads, window=of.window, positions=half),
        # 63 tokens and their landmark fill the tile of 64 of the authors' and of our kernels; they pair neighbouring
        # dimensions.
        "landmark": Landmark(heads=of.heads, block=63, positions=Rotary(layout="interleaved")),
        # Half of the heads shared and half of the routed ones active: 75 % in all, the authors' LLaMA3-8B.
        "mixture_of_heads": MixtureOfHeads(
            heads=of.heads, shared=of.heads // 2, active=of.heads // 4, gates="ones", positions=half
        ),
        "hyena": Hyena(maximum_length=of.length, filter_order=min(64, of.width // 8)),
    }


def _based(size: str) -> LanguageModel:
    """Returns Based's model: gated convolutions (c), Taylor attention of 16 features (t) and windows (w); epsilons are
    the published ones."""
    width, heads, window, layers = BASED[size]
    mixers: dict[str, MixerConfig] = {
        "c": GatedConvolution(kernel=3, expansion=4),
        "t": LinearAttention(heads=heads, feature_dim=16, feature_map=Taylor(), epsilon=1e-12),
        "w": SlidingWindow(heads=heads, window=window, positions=Rotary()),
    }
    stages = tuple(
        Stage(pattern=tuple(mixers[letter] for letter in letters), repeats=repeats)
        for letters, repeats in layers.items()
    )
    return LanguageModel(width=width, stages=stages, norm=RMSNorm(epsilon=1e-5), mlp=SwiGLU(hidden=2 * width))


def _optimizer(pattern: str, size: str) -> AdamW:
    """Returns Based's reference setting, or what was published for the mixer at that size."""
    rate, warmup = (1e-3, 50) if size == "30m" else (8e-4, 200)
    groups = (GroupRate(group="filter", factor=1e-3 / rate),) if pattern == "hyena" else ()
    reference = AdamW(
        learning_rate=rate,
        final_fraction=0.1,
        warmup=warmup,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
        groups=groups,
    )
    return chz.replace(reference, **PUBLISHED.get((pattern, size), {}))
