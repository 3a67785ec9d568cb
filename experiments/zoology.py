"""Zoology's Figure 2 (Arora, Eyuboglu et al., ICLR 2024): MQAR at (length, pairs) = (64, 4), (128, 8), (256, 16), (512,
64), widths 64 to 512, vocabulary 8,192, zero filler, two layers without MLP: their blocks add the second norm of the
stream to itself (`PassThrough`). Attention has biases, and dropout of 0.1 on its weights.

Published: 100,000 training examples repeated for 64 epochs, a cosine that falls once per epoch, embedding dropout 0.1,
four learning rates from 1e-4 to 1e-2, best one reported, early stop above 0.99. Here every batch is fresh, so 64 epochs
become as many steps on new examples, and the cosine falls with each step. Attention alone has learned positions; the
others have none. In the studies a mixer of a width has a row, and lengths with their pairs have columns; mixers of
today, after a convolution of width 3, stand beside the published ones.
"""

import chz

from recollect.data.synthetics import MQAR
from recollect.experiments.study import Study, grid
from recollect.layers import (
    Attention,
    BaseConvolution,
    GatedDeltaNet,
    Hyena,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    MixerConfig,
)
from recollect.layers.modules import LayerNorm, LearnedPositions, PassThrough, Taylor
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW

# length: (pairs, batch), as published.
SETTINGS = {64: (4, 512), 128: (8, 512), 256: (16, 256), 512: (64, 128)}
WIDTHS = (64, 128, 256, 512)
EXAMPLES, EPOCHS = 100_000, 64


def _cell(
    name: str, mixers: tuple[MixerConfig, ...], length: int, width: int, *, positions: bool = False
) -> Experiment:
    pairs, batch = SETTINGS[length]
    per_epoch = -(-EXAMPLES // batch)
    return Experiment(
        name=name,
        model=_model(mixers, width, dropout=0.1, positions=length if positions else None),
        data=MQAR(vocab_size=8192, length=length, pairs=pairs, filler="zero", evaluation_examples=3000),
        optimizer=AdamW(learning_rate=2.15e-3, weight_decay=0.1, decay_everything=True),
        run=Run(
            steps=per_epoch * EPOCHS,
            batch_size=batch,
            steps_per_call=49,
            evaluate_every=per_epoch,
            checkpoint_every=per_epoch,
            stop_at_accuracy=0.99,
        ),
    )


def _model(
    mixers: tuple[MixerConfig, ...], width: int, dropout: float = 0.0, positions: int | None = None
) -> LanguageModel:
    return LanguageModel(
        width=width,
        stages=repeat(*mixers, depth=2),
        norm=LayerNorm(),
        mlp=PassThrough(),
        positions=None if positions is None else LearnedPositions(maximum=positions),
        embedding_dropout=dropout,
    )


def _mixers(length: int) -> dict[str, tuple[MixerConfig, ...]]:
    short, long = BaseConvolution(kernel=3), BaseConvolution(kernel=None, maximum_length=length, time="last")
    return {
        "attention": (Attention(bias=True, dropout=0.1),),
        "gated_delta_net": (short, GatedDeltaNet()),
        "kimi_delta_attention": (short, KimiDeltaAttention()),
        "mamba2": (short, Mamba2(key_dim=32)),
        "hyena": (Hyena(maximum_length=length, time="last", trains_times=True),),
        "base_convolution": (short, long),
        "based": (short, LinearAttention(feature_dim=8, feature_map=Taylor())),
    }


def cell() -> Experiment:
    """One cell on two cores: (64, 4), width 64, a convolution and then attention, batch 64, 3e-3, stops at 0.99.

    python main.py train zoology.cell
    """
    published = _cell("zoology.cell", (BaseConvolution(kernel=3), Attention(bias=True)), 64, 64)
    return chz.replace(
        published,
        model=_model((BaseConvolution(kernel=3), Attention(bias=True)), 64),
        optimizer=AdamW(learning_rate=3e-3, weight_decay=0.1, decay_everything=True),
        run=Run(
            steps=3000, batch_size=64, steps_per_call=50, evaluate_every=50, checkpoint_every=500, stop_at_accuracy=0.99
        ),
    )


def attention() -> Experiment:
    """Figure 2's attention at (64, 4), width 64, as published: two layers, learned positions.

    python main.py train zoology.attention (one learning rate of the four; not yet run to its end here)
    """
    return _cell("zoology.attention", (Attention(bias=True, dropout=0.1),), 64, 64, positions=True)


def figure2() -> Study:
    """Figure 2 whole, and three mixers of today: seven mixers x four lengths x four widths x four learning rates (448
    runs; meant for accelerators, not yet run).

    python main.py compare zoology.figure2
    """
    experiments = [
        chz.replace(
            _cell(f"{label}_d{width}", mixers, length, width, positions=label == "attention"), task=f"{length}x{pairs}"
        )
        for length, (pairs, _) in SETTINGS.items()
        for width in WIDTHS
        for label, mixers in _mixers(length).items()
    ]
    return Study(tuple(experiments), grid({"optimizer.learning_rate": (1e-4, 4.64e-4, 2.15e-3, 1e-2)}))


def figure2_small() -> Study:
    """Figure 2 for two cores: (16, 2) and (32, 4), widths 16 and 32, vocabulary 64, 800 steps of batches of 64 at 1e-2.
    Attention follows a convolution of width 3 like the others.

    python main.py compare zoology.figure2_small
    """
    experiments = []
    run = Run(steps=800, batch_size=64, steps_per_call=50, evaluate_every=200, checkpoint_every=800)
    for length, pairs in ((16, 2), (32, 4)):
        mixers = _mixers(length) | {"attention": (BaseConvolution(kernel=3), Attention(bias=True))}
        experiments += [
            Experiment(
                name=f"{label}_d{width}",
                task=f"{length}x{pairs}",
                model=_model(mixers[label], width),
                data=MQAR(vocab_size=64, length=length, pairs=pairs, filler="zero"),
                optimizer=AdamW(learning_rate=1e-2, weight_decay=0.1, decay_everything=True),
                run=run,
            )
            for width in (16, 32)
            for label in ("attention", "hyena", "base_convolution", "based")
        ]
    return Study(tuple(experiments))
