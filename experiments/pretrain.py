"""Pretraining from scratch: six mixer patterns at four sizes, and a small study of loss against tokens at equal data.

    python main.py train pretrain.attention_30m                                       # two CPU cores
    python main.py train pretrain.based_360m data.source=PREPARED_FOLDER              # one H100; `main.py prepare` makes the folder
    python main.py train pretrain.based_1b data.source=FOLDER run.mesh.fsdp=8 run.accumulate=4
    python main.py describe pretrain.based_1b run.mesh.fsdp=2 run.mesh.tensor=2 run.mesh.sequence=2 --target
    tpu:v5p:2x2x2 python main.py compare pretrain.curves

Sizes are the numbers of parameters that the attention model has, in round numbers: 30M, 85M and its embedding (GPT-2
small's 125M), 310M and its embedding (360M), 1.2B; the other patterns have as many within 10%, the embedding apart.
Steps of 125m and above are 256 rows of 2,048 tokens,
20,000 of them are 10 billion tokens. The default source, the standard library as bytes, is for trying things: real runs
name a prepared folder. `describe --target h100` and `--target tpu:...` say beforehand what fits.

Losses and hours are given where a run was made; everything else says "not yet run".
"""

from __future__ import annotations

from recollect.experiments.pretrain_models import PATTERNS, experiment, small, small_of
from recollect.experiments.study import Study
from recollect.training.experiment import Experiment


def curves() -> Study:
    """Loss against tokens at equal data: six patterns of 1.2M parameters on the standard library, for two CPU cores.

    python main.py compare pretrain.curves

    1.6 million bytes each; learning_curves.png shows bits a byte on held-out files over tokens. On two cores 4 to 11
    minutes a pattern (2026-11-23): 1.99 bits a byte (Based) to 2.55 (mixture of heads).
    """
    return Study(tuple(small_of(pattern) for pattern in PATTERNS), template=small)


def attention_30m() -> Experiment:
    """Softmax attention in every layer, rotary positions on half of each head, 30M.

    python main.py train pretrain.attention_30m
    Hardware: two CPU cores. Hours: 2.6 at the 430 tokens a second of `bench pretraining` (2026-11-23). Loss: not yet
    run.
    """
    return experiment("attention", "30m")


def attention_125m() -> Experiment:
    """Softmax attention in every layer, rotary positions on half of each head, 125M.

    python main.py train pretrain.attention_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("attention", "125m")


def attention_360m() -> Experiment:
    """Softmax attention in every layer, rotary positions on half of each head, 360M. Published shape.

    python main.py train pretrain.attention_360m data.source=FOLDER
    Hardware: one H100; of its memory the step takes 40.3 GiB (bytes, `describe --target h100`). Hours and loss: not yet
    run.
    """
    return experiment("attention", "360m")


def attention_1b() -> Experiment:
    """Softmax attention in every layer, rotary positions on half of each head, 1B.

    python main.py train pretrain.attention_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """
    return experiment("attention", "1b")


def based_30m() -> Experiment:
    """Based: gated convolutions, Taylor linear attention, windows of 64 tokens before the query, 30M.

    python main.py train pretrain.based_30m
    Hardware: two CPU cores. Hours: 2.2 at the 511 tokens a second of `bench pretraining` (2026-11-23). Loss: not yet
    run.
    """
    return experiment("based", "30m")


def based_125m() -> Experiment:
    """Based: gated convolutions, Taylor linear attention, windows of 128 tokens before the query, 125M.

    python main.py train pretrain.based_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("based", "125m")


def based_360m() -> Experiment:
    """Based: gated convolutions, Taylor linear attention, windows of 128 tokens before the query, 360M. Published
    shape.

    python main.py train pretrain.based_360m data.source=FOLDER
    Hardware: one H100; of its memory the step takes 46.1 GiB (bytes, `describe --target h100`). Hours and loss: not yet
    run.
    """
    return experiment("based", "360m")


def based_1b() -> Experiment:
    """Based: gated convolutions, Taylor linear attention, windows of 128 tokens before the query, 1B. Published shape
    (1.3B).

    python main.py train pretrain.based_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """
    return experiment("based", "1b")


def window_30m() -> Experiment:
    """Sliding windows of 128 tokens in every layer, 30M.

    python main.py train pretrain.window_30m
    Hardware: two CPU cores. Hours: 2.5 at the 459 tokens a second of `bench pretraining` (2026-11-23). Loss: not yet
    run.
    """
    return experiment("window", "30m")


def window_125m() -> Experiment:
    """Sliding windows of 512 tokens in every layer, 125M.

    python main.py train pretrain.window_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("window", "125m")


def window_360m() -> Experiment:
    """Sliding windows of 512 tokens in every layer, 360M.

    python main.py train pretrain.window_360m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("window", "360m")


def window_1b() -> Experiment:
    """Sliding windows of 512 tokens in every layer, 1B.

    python main.py train pretrain.window_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """
    return experiment("window", "1b")


def landmark_30m() -> Experiment:
    """Landmark attention in blocks of 63 tokens in every layer, 30M.

    python main.py train pretrain.landmark_30m
    Hardware: two CPU cores. Hours: 3.6 at the 317 tokens a second of `bench pretraining` (2026-11-23). Loss: not yet
    run.
    """
    return experiment("landmark", "30m")


def landmark_125m() -> Experiment:
    """Landmark attention in blocks of 63 tokens in every layer, 125M. Published optimizer.

    python main.py train pretrain.landmark_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("landmark", "125m")


def landmark_360m() -> Experiment:
    """Landmark attention in blocks of 63 tokens in every layer, 360M.

    python main.py train pretrain.landmark_360m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("landmark", "360m")


def landmark_1b() -> Experiment:
    """Landmark attention in blocks of 63 tokens in every layer, 1B.

    python main.py train pretrain.landmark_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """
    return experiment("landmark", "1b")


def mixture_of_heads_30m() -> Experiment:
    """Mixture of heads in every layer: half shared, half of the rest active, 75 % in all, 30M.

    python main.py train pretrain.mixture_of_heads_30m
    Hardware: two CPU cores. Hours: 2.7 at the 429 tokens a second of `bench pretraining` (2026-11-23). Loss: not yet
    run.
    """
    return experiment("mixture_of_heads", "30m")


def mixture_of_heads_125m() -> Experiment:
    """Mixture of heads in every layer: half shared, half of the rest active, 75 % in all, 125M. Published shape and
    learning rate.

    python main.py train pretrain.mixture_of_heads_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("mixture_of_heads", "125m")


def mixture_of_heads_360m() -> Experiment:
    """Mixture of heads in every layer: half shared, half of the rest active, 75 % in all, 360M.

    python main.py train pretrain.mixture_of_heads_360m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("mixture_of_heads", "360m")


def mixture_of_heads_1b() -> Experiment:
    """Mixture of heads in every layer: half shared, half of the rest active, 75 % in all, 1B.

    python main.py train pretrain.mixture_of_heads_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """
    return experiment("mixture_of_heads", "1b")


def hyena_30m() -> Experiment:
    """Hyena in every layer, filters as long as a row, 30M.

    python main.py train pretrain.hyena_30m
    Hardware: two CPU cores. Hours: 3.0 at the 377 tokens a second of `bench pretraining` (2026-11-23). Loss: not yet
    run.
    """
    return experiment("hyena", "30m")


def hyena_125m() -> Experiment:
    """Hyena in every layer, filters as long as a row, 125M.

    python main.py train pretrain.hyena_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("hyena", "125m")


def hyena_360m() -> Experiment:
    """Hyena in every layer, filters as long as a row, 360M.

    python main.py train pretrain.hyena_360m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """
    return experiment("hyena", "360m")


def hyena_1b() -> Experiment:
    """Hyena in every layer, filters as long as a row, 1B.

    python main.py train pretrain.hyena_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """
    return experiment("hyena", "1b")
