"""Pretraining from scratch: twenty mixer patterns at four sizes, and a small study of loss against tokens at equal
data.

    python main.py train pretrain.attention_30m                            # two CPU cores
    python main.py train pretrain.based_360m data.source=PREPARED_FOLDER   # one H100; the folder is `main.py prepare`'s
    python main.py train pretrain.based_1b data.source=FOLDER run.mesh.fsdp=8 run.accumulate=4
    python main.py describe pretrain.based_1b run.mesh.fsdp=2 run.mesh.tensor=2 run.mesh.sequence=2 \\
        --target tpu:v5p:2x2x2
    python main.py compare pretrain.curves

Sizes are the numbers of parameters that the attention model has, in round numbers: 30M, 85M and its embedding (GPT-2
small's 125M), 310M and its embedding (360M), 1.2B; the other patterns have as many within 10%, the embedding apart.
Steps of 125m and above are 256 rows of 2,048 tokens: 20,000 of them are 10 billion tokens. The default source, the
standard library as bytes, is for trying things: real runs name a prepared folder. `describe --target h100` and
`--target tpu:...` report beforehand what fits.

Losses and hours are given where a run was made; everything else says "not yet run" (pretrain_table.py).
"""

from typing import Any

import chz

from recollect.configuration import UserError
from recollect.data.text.dataset import Text
from recollect.experiments.pretrain_models import MODELS
from recollect.experiments.pretrain_sizes import CURVES, SIZES, in_turn
from recollect.experiments.pretrain_table import DOCSTRINGS as VARIANTS
from recollect.experiments.pretrain_table import PATTERNS
from recollect.experiments.study import Study
from recollect.layers import Hyena, MixerConfig
from recollect.models import LanguageModel
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW, GroupRate

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

COMPARED = ("attention", "based", "window", "landmark", "mixture_of_heads", "hyena")
"""The patterns of `pretrain.curves`."""


def variant(name: str) -> Experiment:
    """Returns the experiment of a name in VARIANTS, PATTERN_SIZE.

    Raises:
      UserError: there is no such pattern or size.
    """
    pattern, _, size = name.rpartition("_")
    if name not in VARIANTS:
        raise UserError(f"pretrain.{name}: patterns are {', '.join(PATTERNS)}, sizes {', '.join(SIZES)}")
    of = SIZES[size]
    small = size == "30m"
    model = MODELS[pattern](of)
    if not small:
        # On an H100 "dots" moves a quarter less through main memory than keeping everything ("none"), by `describe
        # --target h100`; a scan over layers copies what it keeps for the backward pass into a stack and out again.
        model = chz.replace(model, dtype="bfloat16", remat="full" if size == "1b" else "dots", unroll=size != "1b")
    return Experiment(
        name=f"pretrain.{name}",
        model=model,
        data=Text(source="stdlib", length=of.length, held_out_bytes=32_768 if small else 10_000_000),
        optimizer=_optimizer(pattern, size, model),
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


def curves() -> Study:
    """Loss against tokens at equal data: six patterns of 1.2M parameters on the standard library, for two CPU cores.

    python main.py compare pretrain.curves

    1.6 million bytes each; learning_curves.png shows bits per byte on held-out files over tokens. On two cores 4 to 11
    minutes per pattern (2026-11-23): 1.99 bits per byte (Based) to 2.55 (mixture of heads).
    """
    return Study(tuple(small_of(pattern) for pattern in COMPARED), template=small)


def small_of(pattern: str) -> Experiment:
    """Returns one pattern's small model, `pretrain.PATTERN`."""
    return _small(f"pretrain.{pattern}", MODELS[pattern](CURVES))


def small(label: str, mixer: MixerConfig) -> Experiment:
    """Returns a model of 1.2M parameters with `mixer` in all of its 6 layers of width 128."""
    return _small(label, in_turn(CURVES, mixer))


def _small(label: str, model: LanguageModel) -> Experiment:
    """Returns 400 steps of a small model: 1.6 million bytes of the standard library."""
    return Experiment(
        name=label,
        model=model,
        data=Text(source="stdlib", length=CURVES.length, held_out_bytes=32_768),
        optimizer=AdamW(
            learning_rate=3e-3,
            final_fraction=0.1,
            warmup=50,
            weight_decay=0.1,
            beta2=0.95,
            clip=1.0,
            groups=_filter_rate(model, 1 / 3),
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


def _optimizer(pattern: str, size: str, model: LanguageModel) -> AdamW:
    """Returns Based's reference setting, or what was published for the mixer at that size."""
    rate, warmup = (1e-3, 50) if size == "30m" else (8e-4, 200)
    reference = AdamW(
        learning_rate=rate,
        final_fraction=0.1,
        warmup=warmup,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
        groups=_filter_rate(model, 1e-3 / rate),
    )
    return chz.replace(reference, **PUBLISHED.get((pattern, size), {}))


def _filter_rate(model: LanguageModel, factor: float) -> tuple[GroupRate, ...]:
    """Returns the learning-rate factor of Hyena's filters, for a model that has them."""
    hyena = any(isinstance(mixer, Hyena) for mixer in model.mixers)
    return (GroupRate(group="filter", factor=factor),) if hyena else ()
