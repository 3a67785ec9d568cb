"""Byte-level language models on the interpreter's own standard library source (about 12 MB, no download), for two CPU
cores.

Setting: 4 layers of width 128 with SwiGLU, length 512, documents packed; held-out files are evaluated. A bigram model
fitted to the same training files has about 3.5 bits per byte there; the experiments are held to at least 0.7 less.
"""

from recollect.data.text.dataset import Text
from recollect.layers import (
    Attention,
    GatedConvolution,
    Landmark,
    LinearAttention,
    MixerConfig,
    MixtureOfHeads,
    SlidingWindow,
)
from recollect.layers.modules import Rotary, SwiGLU, Taylor
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW


def _text(name: str, *mixers: MixerConfig) -> Experiment:
    return Experiment(
        name=name,
        model=LanguageModel(width=128, stages=repeat(*mixers, depth=4), mlp=SwiGLU(hidden=256)),
        data=Text(length=512),
        optimizer=AdamW(learning_rate=3e-3, beta2=0.95, weight_decay=0.1, warmup=50, clip=1.0, final_fraction=0.1),
        run=Run(
            steps=300,
            batch_size=8,
            steps_per_call=10,
            log_every=20,
            evaluate_every=100,
            checkpoint_every=100,
            sample_every=150,
            precision="default",
        ),
    )


def based() -> Experiment:
    """Based: gated convolution, Taylor linear attention, window of 64, gated convolution.

    python main.py train text.based
    """
    return _text(
        "text.based",
        GatedConvolution(expansion=2),
        LinearAttention(heads=4, feature_dim=8, feature_map=Taylor()),
        SlidingWindow(window=64, heads=4, positions=Rotary()),
        GatedConvolution(expansion=2),
    )


def attention() -> Experiment:
    """Softmax attention with rotary positions in every layer.

    python main.py train text.attention
    """
    return _text("text.attention", Attention(heads=4, positions=Rotary()))


def landmark() -> Experiment:
    """Landmark attention in blocks of 32 in every layer; evaluate with `...retrieve=2 data.length=4096` to read further
    than trained.

    python main.py train text.landmark
    """
    return _text("text.landmark", Landmark(block=32, heads=4, positions=Rotary()))


def mixture_of_heads() -> Experiment:
    """Mixture of heads, 8 heads, 2 shared, 4 of 6 routed active, in every layer.

    python main.py train text.mixture_of_heads
    """
    return _text("text.mixture_of_heads", MixtureOfHeads(heads=8, shared=2, active=4, positions=Rotary()))
