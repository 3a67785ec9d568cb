"""What usually helps a run that answers no better than a guess: each piece of advice with the number of the run's own
that it follows from, and the command that tries it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recollect.configuration.read_json import read_json_object
from recollect.evaluation.curves import training_curve
from recollect.training.diagnosis.look import Look

SOLVED = 0.98
"""Accuracy from which there is nothing to advise."""
FALLING = 0.02
"""A share of the loss: a run whose loss falls by more over the last quarter of its steps has not ended learning."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """Why something may help, and the command lines that try it."""

    why: str
    commands: tuple[str, ...]


def advise(path: Path, seen: Look, words: Sequence[str]) -> list[Advice]:
    """Returns what to try, likeliest first; nothing for a run whose answers are right.

    Args:
      words: the command line that trains the run anew: "train", a name, overrides.

    Raises:
      UserError: the run has no metrics.jsonl, or it is broken.
    """
    result = read_json_object(path / "result.json") if (path / "result.json").exists() else {}
    run = Numbers(path, seen, list(words))
    if "failure" in result:
        failure = result["failure"]
        replay = f"recollect replay {shlex.quote(str(failure['folder']))}"
        calmer = {"optimizer.learning_rate": seen.experiment.optimizer.learning_rate / 10, "optimizer.clip": 1.0}
        return [Advice(f"it diverged at step {failure['step']} ({failure['found']})", (replay, run.again(calmer)))]
    if seen.accuracy >= SOLVED:
        return []
    chance = result.get("chance")
    stuck = chance is not None and seen.accuracy < max(3 * chance, 0.02)
    rules = (_rates, _heads, _state, _steps, _reach) if stuck else (_steps, _rates, _reach, _heads, _state)
    pieces = (rule(run, stuck) for rule in rules)
    return [piece for piece in pieces if piece is not None]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A run: its folder, what was seen of it, and the words of the command line that trains it anew."""

    path: Path
    seen: Look
    words: list[str]

    def mixers(self) -> Iterator[tuple[str, Any]]:
        """Yields each mixer of the stages' patterns, with the path of its config."""
        for number, stage in enumerate(self.seen.experiment.model.stages):
            for position, mixer in enumerate(stage.pattern):
                yield f"model.stages.{number}.pattern.{position}", mixer

    def again(self, changes: dict[str, Any]) -> str:
        """Returns the command line that trains it anew with `changes`, in a folder that their values name."""
        new = [f"{name}={value:g}" for name, value in changes.items()]
        kept = [word for word in self.words if word.partition("=")[0] not in {*changes, "run.directory"}]
        tail = ",".join(f"{name.rpartition('.')[2]}={value:g}" for name, value in changes.items())
        return shlex.join(["recollect", *kept, *new, f"run.directory={self.path}-{tail}"])


def _rates(run: Numbers, stuck: bool) -> Advice | None:
    rate = run.seen.experiment.optimizer.learning_rate
    curve = training_curve(run.path)
    flat = len(curve.loss) > 3 and curve.loss[-1] > 0.97 * curve.loss[0]
    if not (stuck or flat):
        return None
    changes = [{"optimizer.learning_rate": float(f"{rate * factor:.2g}")} for factor in (1 / 3, 3, 10)]
    changes.append({"run.seed": run.seen.experiment.run.seed + 1})
    logged = len(curve.loss) > 0
    moved = f"the loss went from {curve.loss[0]:.3g} to {curve.loss[-1]:.3g}" if logged else "nothing is logged"
    why = f"{moved} at a learning rate of {rate:g}: try others, and another seed"
    return Advice(why, tuple(map(run.again, changes)))


def _steps(run: Numbers, stuck: bool) -> Advice | None:
    curve = training_curve(run.path)
    late = len(curve.loss) // 4
    if late < 2:
        return None
    before, after = float(np.nanmean(curve.loss[-2 * late : -late])), float(np.nanmean(curve.loss[-late:]))
    if not after < (1 - FALLING) * before:
        return None
    why = f"the loss still fell at the end (from {before:.3g} to {after:.3g} over the last quarter of the logged steps)"
    return Advice(f"{why}: train longer", (run.again({"run.steps": 3 * run.seen.experiment.run.steps}),))


def _heads(run: Numbers, stuck: bool) -> Advice | None:
    width = run.seen.experiment.model.width
    for path, mixer in run.mixers():
        if getattr(mixer, "heads", None) == 1 and width % 4 == 0:
            why = f"{type(mixer).__name__} has one head of {width} dimensions: try more"
            return Advice(why, (run.again({f"{path}.heads": 2}), run.again({f"{path}.heads": 4})))
    return None


def _state(run: Numbers, stuck: bool) -> Advice | None:
    """Where a state of fixed size keeps keys in few dimensions for the pairs: random keys are told apart in features of
    several dimensions a pair only."""
    data: Any = run.seen.experiment.data
    slices = data.evaluation_slices() if data.made_on_device else ()
    pairs = max((getattr(part, "pairs", 0) for part in slices), default=0)
    for path, mixer in run.mixers():
        size = getattr(mixer, "feature_dim", None)
        if pairs and size is not None and size < 4 * pairs:
            why = f"{type(mixer).__name__} keeps {pairs} pairs in features of {size} dimensions: try a larger state"
            larger = {f"{path}.feature_dim": 2 * size}, {"model.width": 2 * run.seen.experiment.model.width}
            return Advice(why, tuple(map(run.again, larger)))
    return None


def _reach(run: Numbers, stuck: bool) -> Advice | None:
    """Where near answers are right and far ones are not."""
    shares = {bin_: right / count for bin_, (right, count) in run.seen.correct_by_distance.items() if count >= 8}
    if len(shares) < 2:
        return None
    near, far = shares[min(shares)], shares[max(shares)]
    if near - far < 0.2:
        return None
    why = f"{near:.0%} are right up to {min(shares)} tokens back, {far:.0%} beyond {max(shares) // 2}"
    for path, mixer in run.mixers():
        window = getattr(mixer, "window", None)
        if window is not None and window < max(shares):
            return Advice(f"{why}, and a window sees {window}", (run.again({f"{path}.window": max(shares) + 1}),))
    doubled = {"model.width": 2 * run.seen.experiment.model.width}
    return Advice(f"{why}: what is far is forgotten; a wider model keeps more", (run.again(doubled),))
