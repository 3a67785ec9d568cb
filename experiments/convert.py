"""A small attention model that recalls, and what becomes of it with other mixers: recall before, right after the
conversion, and after short training.

    python -m recollect.experiments.convert runs/convert [--only NAME]

Setting: that of `mqar.small` (vocabulary 64, length 32, 4 pairs, width 32) in four layers, each second one attention of
4 heads; learning rate 1e-2, 800 steps, and 200 more after a conversion.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import chz

from recollect.configuration import UserError
from recollect.configuration.console import exit_code
from recollect.data.synthetics import MQAR
from recollect.experiments import mqar
from recollect.layers import Attention, BaseConvolution, Landmark, LinearAttention, MixtureOfHeads, SlidingWindow
from recollect.layers.mixer import MixerConfig
from recollect.layers.modules import Hedgehog
from recollect.models import repeat
from recollect.training.checkpoint.exported import write_safetensors
from recollect.training.checkpoint.load import open_run
from recollect.training.converted_run import converted_run
from recollect.training.evaluator import evaluate
from recollect.training.experiment import Experiment
from recollect.training.step import program_for
from recollect.training.train import train

STEPS, SHORT, TRANSFER = 800, 200, 200
"""Steps of the model, of training after a conversion, and of attention transfer before that."""

FULL, LINEAR = Attention(heads=4), LinearAttention(heads=4, feature_map=Hedgehog())
CONVERSIONS: dict[str, tuple[MixerConfig, MixerConfig]] = {
    "mixture_of_heads": (MixtureOfHeads(heads=4, shared=2, active=1, gates="ones"),) * 2,
    "landmark": (Landmark(heads=4, block=8),) * 2,
    "window_with_sinks": (SlidingWindow(heads=4, window=9, sinks="first", first=2),) * 2,
    "linear_hybrid": (LINEAR, FULL),
    "linear": (LINEAR, LINEAR),
}
"""The mixers of the second and of the last layer."""


def attention() -> Experiment:
    """The model that is converted: convolution, attention, convolution, attention (experiments/convert.py).

    python main.py train convert.attention
    """
    return _experiment("convert.attention", (FULL, FULL), STEPS)


def _experiment(name: str, mixers: tuple[MixerConfig, MixerConfig], steps: int) -> Experiment:
    """Returns the setting with these mixers after convolutions."""
    plain = mqar.recall(name, FULL, width=32, data=MQAR(vocab_size=64, length=32, pairs=4))
    pattern = [layer for mixer in mixers for layer in (BaseConvolution(kernel=3), mixer)]
    model = chz.replace(plain.model, stages=repeat(*pattern, depth=4))
    run = chz.replace(plain.run, steps=steps, checkpoint_every=steps, evaluate_every=400)
    return chz.replace(plain, model=model, optimizer=chz.replace(plain.optimizer, learning_rate=1e-2), run=run)


def convert(out: Path, name: str) -> dict[str, Any]:
    """Trains the attention model in `out` if it is not there, and one conversion of it; returns the recall of each, and
    the loss of attention transfer at its first and last step.

    Raises:
      UserError: there is no conversion of that name.
    """
    if name not in CONVERSIONS:
        raise UserError(f"there is no conversion {name!r}; there are {', '.join(CONVERSIONS)}")
    before = attention()
    before = chz.replace(before, run=chz.replace(before.run, directory=str(out / "attention")))
    result: dict[str, Any] = {"attention": train(before)["accuracy"]}
    after = _experiment(f"convert.{name}", CONVERSIONS[name], SHORT)
    source, start = open_run(out / "attention"), out / f"{name}.start"
    for step, steps in {"converted": 0, "transferred": TRANSFER}.items():
        if steps and LINEAR not in CONVERSIONS[name]:
            continue
        run, losses = converted_run(source, after, steps)
        result[step] = evaluate(program_for(after), run.params, after.run.seed)["accuracy"]
        if losses:
            result["transfer loss"] = (losses[0], losses[-1])
    write_safetensors(run, start, overwrite=True)
    folders = {"directory": str(out / name), "initialize": str(start)}
    result["trained"] = train(chz.replace(after, run=chz.replace(after.run, **folders)))["accuracy"]
    return result


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", action="append", default=[], choices=list(CONVERSIONS))
    options = parser.parse_args()
    columns = ("attention", "converted", "transferred", "trained")
    print("| becomes | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|", flush=True)
    for name in options.only or CONVERSIONS:
        result = convert(options.out, name)
        shown = " | ".join(f"{result[each]:.3f}" if each in result else "-" for each in columns)
        print(f"| {name} | {shown} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
