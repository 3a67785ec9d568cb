"""Recall in the four patterns of attention of CAB (Zhang et al. 2023, arXiv 2210.07661), at a size for two CPU cores.

    noncausal self    MaskedRecall    a short convolution in both directions, then the mixer
    causal self       MQAR            a causal short convolution, then the mixer
    noncausal cross   SourceRecall    an encoder of one short convolution, which two layers of the mixer read
    causal cross      SourceCopying   the same encoder; a causal short convolution, then the mixer

Width 32, no MLP, learned positions, batch 64, 800 steps, one seed. A mixer is in the rows of the patterns that it
serves (layers/patterns.py).

    python main.py compare cab.patterns
    python -m recollect.experiments.cab runs/cab.patterns    # accuracies, and CAB's composite index
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence

from recollect.configuration import UserError
from recollect.configuration.console import exit_code
from recollect.data.synthetics import MQAR, MaskedRecall, SourceCopying, SourceRecall, SyntheticTask
from recollect.evaluation.composite_index import composite_index, references
from recollect.evaluation.results import find_runs, load_runs
from recollect.evaluation.summaries import Summary, summarise
from recollect.experiments.study import Study, grid
from recollect.layers import (
    Attention,
    DifferentialAttention,
    GatedDeltaNet,
    Hyena,
    LinearAttention,
    Mamba2,
    ShortConvolution,
)
from recollect.layers.mixer import MixerConfig
from recollect.layers.modules import LayerNorm, LearnedPositions
from recollect.layers.patterns import Pattern, in_pattern
from recollect.models import Encoder, LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW

TASKS: dict[Pattern, SyntheticTask] = {
    Pattern(task.pattern): task
    for task in (
        MaskedRecall(extrapolation=()),
        MQAR(vocab_size=64, length=32, pairs=8),
        SourceRecall(pairs=16, extrapolation=()),
        SourceCopying(extrapolation=()),
    )
}


def mixers(length: int) -> dict[str, MixerConfig]:
    """Returns the mixers by name, in causal self attention, for sequences of `length` tokens."""
    return {
        "attention": Attention(heads=2),
        "differential": DifferentialAttention(heads=2),
        "based": LinearAttention(),
        "gated_delta_net": GatedDeltaNet(),
        "mamba2": Mamba2(key_dim=16),
        "hyena": Hyena(maximum_length=length),
    }


def _model(pattern: Pattern, mixer: MixerConfig, length: int) -> LanguageModel:
    positions = LearnedPositions(maximum=2 * length)  # of the stream, or of a source of two tokens per pair
    local = ShortConvolution(kernel=3, causal=pattern.causal)
    both = ShortConvolution(kernel=3, causal=False)
    return LanguageModel(
        width=32,
        norm=LayerNorm(),
        mlp=None,
        positions=positions,
        stages=repeat(*([mixer] if pattern is Pattern.NONCAUSAL_CROSS else [local, mixer]), depth=2),
        encoder=Encoder(stages=repeat(both, depth=1), positions=positions) if pattern.cross else None,
    )


def _experiments() -> Iterator[Experiment]:
    run = Run(steps=800, batch_size=64, steps_per_call=50, evaluate_every=200, checkpoint_every=800)
    for pattern, task in TASKS.items():
        for name, mixer in mixers(task.longest).items():
            try:
                served = in_pattern(mixer, pattern)
            except UserError:
                continue
            model, optimizer = _model(pattern, served, task.longest), AdamW(learning_rate=3e-3)
            yield Experiment(name=name, task=pattern.value, model=model, data=task, optimizer=optimizer, run=run)


def patterns() -> Study:
    """Six mixers in the patterns of attention that they serve, a recall task each, two learning rates, one seed.

    python main.py compare cab.patterns
    """
    return Study(tuple(_experiments()), grid({"optimizer.learning_rate": (3e-3, 1e-2)}))


def _loss(summary: Summary) -> float:
    """Returns the mean loss of the runs at the best learning rate."""
    runs = summary.by_rate[summary.learning_rate].runs
    return statistics.fmean(run.loss for run in runs if run.loss is not None)


def rows(folders: Sequence[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns mixer -> pattern -> accuracy and composite index within the study, of each mixer's best runs."""
    best = {(one.task, one.label): one for one in summarise(load_runs(find_runs(folders)))}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for pattern in Pattern:
        of_pattern = {label: one for (task, label), one in best.items() if task == pattern.value}
        scores = {label: {"recall": {"accuracy": one.best, "loss": _loss(one)}} for label, one in of_pattern.items()}
        within = references(list(scores.values())) if scores else {}
        for label, score in scores.items():
            found.setdefault(label, {})[pattern.value] = of_pattern[label].best, composite_index(score, within)
    return found


def main(folders: Sequence[str]) -> None:
    """Prints accuracy and composite index of finished runs of `patterns`."""
    names = [pattern.value for pattern in Pattern]
    print("mixer".ljust(24), *(name.rjust(18) for name in names))
    for mixer, row in rows(folders).items():
        cells = (f"{row[name][0]:.3f} ({row[name][1]:+.2f})" if name in row else "-" for name in names)
        print(mixer.ljust(24), *(cell.rjust(18) for cell in cells))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
