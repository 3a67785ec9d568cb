"""Multi-query associative recall at a size for two CPU cores: a convolution of width 3, then the mixer, no MLP, no
positions.

Setting of all experiments here: vocabulary 256, length 64, 8 pairs, random filler, width 64, 2 layers, batch 64, AdamW
at 3e-3 with weight decay 0.1 on everything, cosine to 0 over 1,900 steps.
"""

from __future__ import annotations

import chz

from recollect.data.synthetics import MQAR
from recollect.experiments.study import Study, grid
from recollect.layers import Attention, BaseConvolution, Hyena, Landmark, LinearAttention, MixtureOfHeads, SlidingWindow
from recollect.layers.mixer import MixerConfig
from recollect.layers.modules.feature_maps import Taylor
from recollect.layers.modules.norms import LayerNorm
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW

FIXED = MQAR(vocab_size=256, length=64, pairs=8)
SCHEDULE = Run(steps=1900, batch_size=64, steps_per_call=50, evaluate_every=100, checkpoint_every=500)


def recall(name: str, mixer: MixerConfig, width: int = 64, data: MQAR = FIXED, run: Run = SCHEDULE) -> Experiment:
    """The fixed setting with `mixer` as the second layer; `mlp=None` has no second norm, unlike Zoology's blocks."""
    stages = repeat(BaseConvolution(kernel=3), mixer, depth=2)
    model = LanguageModel(width=width, stages=stages, norm=LayerNorm(), mlp=None)
    optimizer = AdamW(learning_rate=3e-3, weight_decay=0.1, decay_everything=True)
    return Experiment(name=name, model=model, data=data, optimizer=optimizer, run=run)


def attention() -> Experiment:
    """Convolution + softmax attention; solves the task."""
    return recall("mqar.attention", Attention())


VARIANTS = {
    "based": "Convolution + linear attention with Taylor features of 8 dimensions (Based).",
    "window": "Convolution + a window of 17 keys; answers what lies in reach, no more.",
    "convolution": "Convolution + a long convolution with an implicit filter; mixes by place, not by content.",
    "hyena": "Convolution + Hyena.",
    "landmark": "Convolution + landmark attention in blocks of 8 tokens and their landmark.",
    "mixture_of_heads": """Convolution + mixture of heads: 4 heads, 2 shared, 1 of 2 routed active, the published code's
    gates.""",
    "mixture_of_heads_paper": "The same with the paper's gates: outputs start several times smaller.",
}
"""Name and docstring of the other experiments, which experiments/registry.py reads without running this file."""


def mixers(length: int, window: int) -> dict[str, MixerConfig]:
    """Returns the mixers of the experiments by name, for sequences of `length` tokens."""
    return {
        "attention": Attention(),
        "based": LinearAttention(feature_dim=8, feature_map=Taylor()),
        "window": SlidingWindow(window=window),
        "convolution": BaseConvolution(kernel=None, maximum_length=length),
        "hyena": Hyena(maximum_length=length),
        "landmark": Landmark(block=8),
        "mixture_of_heads": MixtureOfHeads(heads=4, shared=2, active=1, gates="code"),
        "mixture_of_heads_paper": MixtureOfHeads(heads=4, shared=2, active=1, gates="paper"),
    }


def variant(name: str) -> Experiment:
    """Returns the experiment of a name in VARIANTS."""
    return recall(f"mqar.{name}", mixers(FIXED.length, window=17)[name])


def fixed() -> Study:
    """The fixed setting with every mixer, one learning rate and one seed: the README's table (about 10 minutes on two
    cores).

    python main.py compare mqar.fixed
    """
    return Study((attention(), *map(variant, VARIANTS)), template=recall)


def _small(name: str, mixer: MixerConfig) -> Experiment:
    run = chz.replace(SCHEDULE, steps=800, checkpoint_every=800)
    return recall(name, mixer, width=32, data=MQAR(vocab_size=64, length=32, pairs=4), run=run)


def small() -> Study:
    """All seven mixers, two learning rates x two seeds, at vocabulary 64, length 32, 4 pairs, width 32, 800 steps.

    python main.py compare mqar.small
    """
    seven = {name: mixer for name, mixer in mixers(32, window=9).items() if name != "mixture_of_heads_paper"}
    return Study(
        experiments=tuple(_small(f"mqar.{name}", mixer) for name, mixer in seven.items()),
        sweep=grid({"optimizer.learning_rate": (3e-3, 1e-2), "run.seed": (0, 1)}),
        template=_small,
    )
