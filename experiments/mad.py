"""MAD's table (Poli et al., Mechanistic Design and Scaling of Hybrid Architectures, arXiv 2403.17844; athms/mad-lab):
six tasks, two blocks of a mixer and a SwiGLU, width 128, no positions but rotary ones in attention, a head of its own;
on compression the head sees the last token's vector alone (`Autoencoder`).

Published: 66 settings (each variable of a task changed alone), 200 epochs of batches of 128, AdamW with a cosine to
1e-6, learning rates 1e-4, 5e-4 and 1e-3, weight decay 0 and 0.1, the best run counts; a task's score is the mean over
its settings, MAD's score the mean over tasks. States there are about equal: attention of 16 heads, Mamba of state 4,
gated linear attention of 8 heads; DeltaNet and the mixers of today beside them have 4 heads here.

    python main.py compare mad.table                     # 66 columns
    python -m recollect.experiments.mad runs/mad.table   # six, and the score
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from recollect.configuration.console import exit_code
from recollect.data.synthetics import SyntheticTask, mad, mad_score, mad_settings
from recollect.data.synthetics.mad import MAD
from recollect.evaluation.results import find_runs, load_runs
from recollect.evaluation.summaries import summarise
from recollect.experiments.study import Study, grid
from recollect.layers import (
    Attention,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    Hyena,
    KimiDeltaAttention,
    Mamba,
    Mamba2,
)
from recollect.layers.mixer import MixerConfig
from recollect.layers.modules import Rotary, SwiGLU
from recollect.models import Autoencoder, LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW

EPOCHS, BATCH = 200, 128

SMALL: dict[str, dict[str, Any]] = {
    "in_context_recall": {"length": 31},
    "fuzzy_recall": {"length": 32},
    "noisy_recall": {"length": 31},
    "selective_copying": {"length": 32, "copies": 8},
    "compression": {"length": 12},
    "memorization": {"vocab_size": 64, "length": 16},
}
"""What `small` changes of a task's baseline, beside a training set without end."""


def _mixers(length: int) -> dict[str, MixerConfig]:
    return {
        "attention": Attention(heads=16, positions=Rotary()),
        "hyena": Hyena(maximum_length=length),
        "mamba": Mamba(state=4),
        "gla": GatedLinearAttention(heads=8, key_dim=16),
        "delta_net": DeltaNet(heads=4),
        "gated_delta_net": GatedDeltaNet(heads=4),
        "kimi_delta_attention": KimiDeltaAttention(heads=4),
        "mamba2": Mamba2(key_dim=32),
    }


def _on(task: str, data: SyntheticTask, name: str, mixer: MixerConfig, width: int, run: Run) -> Experiment:
    model = Autoencoder if task.startswith("compression") else LanguageModel
    return Experiment(
        name=name,
        task=task,
        model=model(width=width, stages=repeat(mixer, depth=2), mlp=SwiGLU(), tied=False),
        data=data,
        optimizer=AdamW(learning_rate=5e-4, final_fraction=2e-3, weight_decay=0.1),
        run=run,
    )


def table() -> Study:
    """MAD's table with today's mixers: eight mixers, 66 settings, three learning rates, two weight decays (3,168 runs
    of up to 20,000 steps; meant for accelerators, not yet run)."""
    experiments = []
    for name in MAD:
        for change, data in mad_settings(name):
            task = " ".join([name, *(f"{field}={value}" for field, value in change.items())])
            steps = EPOCHS * -(-(data.train_examples or BATCH) // BATCH)
            run = Run(steps=steps, batch_size=BATCH, steps_per_call=50, evaluate_every=steps, checkpoint_every=steps)
            experiments += [_on(task, data, *mixer, 128, run) for mixer in _mixers(data.longest).items()]
    sweep = grid({"optimizer.learning_rate": (1e-4, 5e-4, 1e-3), "optimizer.weight_decay": (0.0, 0.1)})
    return Study(tuple(experiments), sweep)


def small() -> Study:
    """Three mixers on the six baselines at about a quarter of their lengths, width 32, 600 steps of batches of 64 at
    3e-3, without a limited training set.

    python main.py compare mad.small
    """
    run = Run(steps=600, batch_size=64, steps_per_call=50, evaluate_every=600, checkpoint_every=600)
    mixers = {
        "attention": Attention(heads=4, positions=Rotary()),
        "gla": GatedLinearAttention(heads=2, key_dim=16),
        "delta_net": DeltaNet(heads=2),
    }
    experiments = [
        _on(name, mad(name, train_examples=None, **fields), *mixer, 32, run)
        for name, fields in SMALL.items()
        for mixer in mixers.items()
    ]
    return Study(tuple(experiments), grid({"optimizer.learning_rate": (3e-3,)}))


def scores(bests: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float | None]]:
    """Returns the means over settings by task, and "score", MAD's, of each mixer; None where a setting is missing.

    Args:
      bests: (mixer, task with its setting, as `table` names it) -> accuracy of the best run.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for (mixer, task), accuracy in bests.items():
        found.setdefault(mixer, {}).setdefault(task.partition(" ")[0], []).append(accuracy)
    rows: dict[str, dict[str, float | None]] = {}
    for mixer, tasks in found.items():
        whole = {name: len(tasks.get(name, ())) == 1 + len(MAD[name][2]) for name in MAD}
        rows[mixer] = {name: sum(tasks[name]) / len(tasks[name]) if whole[name] else None for name in MAD}
        rows[mixer]["score"] = mad_score(tasks) if all(whole.values()) else None
    return rows


def main(folders: Sequence[str]) -> None:
    """Prints MAD's table of finished runs of `table`."""
    bests = {(one.label, one.task): one.best for one in summarise(load_runs(find_runs(folders)))}
    print("mixer".ljust(24), *(name[:18].rjust(18) for name in (*MAD, "score")))
    for mixer, row in scores(bests).items():
        print(mixer.ljust(24), *(("-" if value is None else f"{100 * value:.1f}").rjust(18) for value in row.values()))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
