"""Based's Figure 2 (Arora et al., ICML 2024): recall against state size. Trained on a mixture of lengths up to (256,
64), evaluated up to (1024, 256); vocabulary 8,192, random filler, a convolution of width 3 and then the mixer, two
layers without MLP (their blocks add the second norm of the stream to itself, `PassThrough`), no positions. Published
attention has biases and drops a tenth of its weights; a published window of w sees w + 1 keys, and Hyena stands in
both layers.

Published: 180,000 examples a pass, 32 passes, batch 256, learning rates 1e-3 to 10^-1.5, the best one reported. Here
batches are fresh, and filler never contradicts a pair; `data.contradictions=True` gives the published filler.
"""

import chz

from recollect.data.synthetics import MQAR, RecallSlice
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
    SlidingWindow,
)
from recollect.layers.modules import LayerNorm, PassThrough, Taylor
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW

MIXTURE = ((64, 4, 100.0), (128, 8, 20.0), (256, 16, 20.0), (256, 32, 20.0), (256, 64, 20.0))
EVALUATION = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
STEPS = 32 * -(-180_000 // 256)


def _recall(name: str, mixer: MixerConfig, width: int) -> Experiment:
    first = mixer if isinstance(mixer, Hyena) else BaseConvolution(kernel=3)
    return Experiment(
        name=name,
        model=LanguageModel(
            width=width,
            stages=repeat(first, mixer, depth=2),
            norm=LayerNorm(),
            mlp=PassThrough(),
            embedding_dropout=0.1,
        ),
        data=MQAR(
            vocab_size=8192,
            mixture=tuple(RecallSlice(length=length, pairs=pairs, weight=weight) for length, pairs, weight in MIXTURE),
            evaluation=tuple(RecallSlice(length=length, pairs=pairs) for length, pairs in EVALUATION),
        ),
        optimizer=AdamW(learning_rate=3.16e-3, weight_decay=0.1, decay_everything=True),
        run=Run(steps=STEPS, batch_size=256, steps_per_call=44, evaluate_every=704, checkpoint_every=704),
    )


def taylor() -> Experiment:
    """Figure 2's Based point of width 64 and feature dimension 16.

    python main.py train based.taylor (meant for an accelerator; not yet run to its end)
    """
    return _recall("based.taylor", LinearAttention(feature_dim=16, feature_map=Taylor()), 64)


def figure2() -> Study:
    """Figure 2's mixers of this project: attention, Based (widths x feature dimensions), windows, Hyena; and mixers of
    today, whose states are the smaller the more heads they have; four learning rates (124 runs, not yet run).

    python main.py compare based.figure2
    """
    hyena = Hyena(maximum_length=1024, time="last", trains_times=True)
    points = [
        *((f"attention_d{width}", Attention(bias=True, dropout=0.1), width) for width in (64, 128)),
        *(
            (f"taylor_d{width}_f{features}", LinearAttention(feature_dim=features, feature_map=Taylor()), width)
            for width in (48, 64, 128)
            for features in (8, 16, 24)
        ),
        *(
            (f"window_{w}", SlidingWindow(window=w + 1, bias=True, dropout=0.1), 128)
            for w in (8, 16, 32, 64, 128, 256, 512, 1024)
        ),
        *((f"hyena_d{width}", hyena, width) for width in (64, 128, 256)),
        *((f"gated_delta_net_h{heads}", GatedDeltaNet(heads=heads), 128) for heads in (1, 2, 4)),
        *((f"kimi_delta_attention_h{heads}", KimiDeltaAttention(heads=heads), 128) for heads in (1, 2, 4)),
        *((f"mamba2_k{key_dim}", Mamba2(key_dim=key_dim), 128) for key_dim in (16, 64, 128)),
    ]
    experiments = tuple(_recall(f"based.{name}", mixer, width) for name, mixer, width in points)
    return Study(experiments, grid({"optimizer.learning_rate": (1e-3, 3.16e-3, 1e-2, 3.16e-2)}))


def figure2_small() -> Study:
    """Figure 2 for two cores: 4 pairs in 32 tokens, vocabulary 64, width 32, 800 steps of batches of 64 at 1e-2.

    python main.py compare based.figure2_small
    """
    points: dict[str, MixerConfig] = {
        "attention": Attention(bias=True),
        **{f"window_{w}": SlidingWindow(window=w + 1, bias=True) for w in (4, 8, 16)},
        **{
            f"taylor_f{features}": LinearAttention(feature_dim=features, feature_map=Taylor()) for features in (2, 4, 8)
        },
        **{f"gated_delta_net_h{heads}": GatedDeltaNet(heads=heads) for heads in (1, 2, 8)},
    }
    published = [_recall(f"based.{name}", mixer, 32) for name, mixer in points.items()]
    run = Run(steps=800, batch_size=64, steps_per_call=50, evaluate_every=200, checkpoint_every=800)
    data = MQAR(vocab_size=64, length=32, pairs=4)
    experiments = [
        chz.replace(one, model=chz.replace(one.model, embedding_dropout=0.0), data=data, run=run) for one in published
    ]
    return Study(tuple(experiments), grid({"optimizer.learning_rate": (1e-2,)}))
