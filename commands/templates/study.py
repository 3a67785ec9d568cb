"""new_study: say here what is compared."""

import chz

from recollect.data.synthetics import MQAR
from recollect.experiments.mqar import SCHEDULE, recall
from recollect.experiments.study import Study, grid
from recollect.layers import Attention, LinearAttention, SlidingWindow
from recollect.layers.modules.feature_maps import Taylor


def new_study() -> Study:
    """Three mixers on associative recall, at two learning rates and two seeds."""
    mixers = {
        "attention": Attention(),
        "based": LinearAttention(feature_dim=8, feature_map=Taylor()),
        "window": SlidingWindow(window=9),
    }
    data, run = MQAR(vocab_size=64, length=32, pairs=4), chz.replace(SCHEDULE, steps=800)
    return Study(
        experiments=tuple(recall(name, mixer, width=32, data=data, run=run) for name, mixer in mixers.items()),
        sweep=grid({"optimizer.learning_rate": (3e-3, 1e-2), "run.seed": (0, 1)}),
    )
