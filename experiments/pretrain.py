"""Pretraining from scratch: six mixer patterns at four sizes, and a small study of loss against tokens at equal data.

    python main.py train pretrain.attention_30m                            # two CPU cores
    python main.py train pretrain.based_360m data.source=PREPARED_FOLDER   # one H100; the folder is `main.py prepare`'s
    python main.py train pretrain.based_1b data.source=FOLDER run.mesh.fsdp=8 run.accumulate=4
    python main.py describe pretrain.based_1b run.mesh.fsdp=2 run.mesh.tensor=2 run.mesh.sequence=2 \\
        --target tpu:v5p:2x2x2
    python main.py compare pretrain.curves

Sizes are the numbers of parameters that the attention model has, in round numbers: 30M, 85M and its embedding (GPT-2
small's 125M), 310M and its embedding (360M), 1.2B; the other patterns have as many within 10%, the embedding apart.
Steps of 125m and above are 256 rows of 2,048 tokens,
20,000 of them are 10 billion tokens. The default source, the standard library as bytes, is for trying things: real runs
name a prepared folder. `describe --target h100` and `--target tpu:...` report beforehand what fits.

Losses and hours are given where a run was made; everything else says "not yet run".
"""

from recollect.experiments.pretrain_models import PATTERNS, experiment, small, small_of
from recollect.experiments.study import Study
from recollect.training.experiment import Experiment

VARIANTS = {
    "attention_30m": """Softmax attention in every layer, rotary positions on half of each head, 30M.

    python main.py train pretrain.attention_30m
    Hardware: two CPU cores. Hours: 2.6 at the 430 tokens per second of `bench pretraining` (2026-11-23). Loss: not
    yet run.
    """,
    "attention_125m": """Softmax attention in every layer, rotary positions on half of each head, 125M.

    python main.py train pretrain.attention_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "attention_360m": """Softmax attention in every layer, rotary positions on half of each head, 360M. Published
    shape.

    python main.py train pretrain.attention_360m data.source=FOLDER
    Hardware: one H100; of its memory the step takes 40.3 GiB (bytes, `describe --target h100`). Hours and loss: not
    yet run.
    """,
    "attention_1b": """Softmax attention in every layer, rotary positions on half of each head, 1B.

    python main.py train pretrain.attention_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """,
    "based_30m": """Based: gated convolutions, Taylor linear attention, windows of 64 tokens before the query,
    30M.

    python main.py train pretrain.based_30m
    Hardware: two CPU cores. Hours: 2.2 at the 511 tokens per second of `bench pretraining` (2026-11-23). Loss: not
    yet run.
    """,
    "based_125m": """Based: gated convolutions, Taylor linear attention, windows of 128 tokens before the
    query, 125M.

    python main.py train pretrain.based_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "based_360m": """Based: gated convolutions, Taylor linear attention, windows of 128 tokens before the
    query, 360M. Published shape.

    python main.py train pretrain.based_360m data.source=FOLDER
    Hardware: one H100; of its memory the step takes 46.1 GiB (bytes, `describe --target h100`). Hours and loss: not
    yet run.
    """,
    "based_1b": """Based: gated convolutions, Taylor linear attention, windows of 128 tokens before the
    query, 1B. Published shape (1.3B).

    python main.py train pretrain.based_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """,
    "window_30m": """Sliding windows of 128 tokens in every layer, 30M.

    python main.py train pretrain.window_30m
    Hardware: two CPU cores. Hours: 2.5 at the 459 tokens per second of `bench pretraining` (2026-11-23). Loss: not
    yet run.
    """,
    "window_125m": """Sliding windows of 512 tokens in every layer, 125M.

    python main.py train pretrain.window_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "window_360m": """Sliding windows of 512 tokens in every layer, 360M.

    python main.py train pretrain.window_360m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "window_1b": """Sliding windows of 512 tokens in every layer, 1B.

    python main.py train pretrain.window_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """,
    "landmark_30m": """Landmark attention in blocks of 63 tokens in every layer, 30M.

    python main.py train pretrain.landmark_30m
    Hardware: two CPU cores. Hours: 3.6 at the 317 tokens per second of `bench pretraining` (2026-11-23). Loss: not
    yet run.
    """,
    "landmark_125m": """Landmark attention in blocks of 63 tokens in every layer, 125M. Published optimizer.

    python main.py train pretrain.landmark_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "landmark_360m": """Landmark attention in blocks of 63 tokens in every layer, 360M.

    python main.py train pretrain.landmark_360m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "landmark_1b": """Landmark attention in blocks of 63 tokens in every layer, 1B.

    python main.py train pretrain.landmark_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """,
    "mixture_of_heads_30m": """Mixture of heads in every layer: half shared, half of the rest active, 75 % in all, 30M.

    python main.py train pretrain.mixture_of_heads_30m
    Hardware: two CPU cores. Hours: 2.7 at the 429 tokens per second of `bench pretraining` (2026-11-23). Loss: not
    yet run.
    """,
    "mixture_of_heads_125m": """Mixture of heads in every layer: half shared, half of the rest active,
    75 % in all, 125M. Published shape and learning rate.

    python main.py train pretrain.mixture_of_heads_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "mixture_of_heads_360m": """Mixture of heads in every layer: half shared, half of the rest active,
    75 % in all, 360M.

    python main.py train pretrain.mixture_of_heads_360m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "mixture_of_heads_1b": """Mixture of heads in every layer: half shared, half of the rest active, 75 % in all, 1B.

    python main.py train pretrain.mixture_of_heads_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """,
    "hyena_30m": """Hyena in every layer, filters as long as a row, 30M.

    python main.py train pretrain.hyena_30m
    Hardware: two CPU cores. Hours: 3.0 at the 377 tokens per second of `bench pretraining` (2026-11-23). Loss: not
    yet run.
    """,
    "hyena_125m": """Hyena in every layer, filters as long as a row, 125M.

    python main.py train pretrain.hyena_125m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "hyena_360m": """Hyena in every layer, filters as long as a row, 360M.

    python main.py train pretrain.hyena_360m data.source=FOLDER
    Hardware: one H100. Hours and loss: not yet run.
    """,
    "hyena_1b": """Hyena in every layer, filters as long as a row, 1B.

    python main.py train pretrain.hyena_1b data.source=FOLDER
    Hardware: eight H100 or a TPU slice. Hours and loss: not yet run.
    """,
}
"""Name and docstring of every variant, which experiments/registry.py reads without running this file."""


def variant(name: str) -> Experiment:
    """Returns the experiment of a name in VARIANTS, PATTERN_SIZE."""
    pattern, _, size = name.rpartition("_")
    return experiment(pattern, size)


def curves() -> Study:
    """Loss against tokens at equal data: six patterns of 1.2M parameters on the standard library, for two CPU cores.

    python main.py compare pretrain.curves

    1.6 million bytes each; learning_curves.png shows bits per byte on held-out files over tokens. On two cores 4 to 11
    minutes per pattern (2026-11-23): 1.99 bits per byte (Based) to 2.55 (mixture of heads).
    """
    return Study(tuple(small_of(pattern) for pattern in PATTERNS), template=small)
