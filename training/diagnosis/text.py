"""The measurements of a run as lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable

from recollect.training.diagnosis.advice import SOLVED, Advice
from recollect.training.diagnosis.look import Example, Look

LARGE, SMALL = 100.0, 1e-7
"""Root mean squares and gradient norms beyond these are marked."""


def lines_of(seen: Look, advice: list[Advice]) -> Iterable[str]:
    """Yields what `recollect diagnose` prints."""
    guess = f"a guess among all tokens {seen.uniform_loss:.4f}"
    yield f"{seen.experiment.name} at step {seen.step:,}: accuracy {seen.accuracy:.1%}, loss {seen.loss:.4f} ({guess})"
    yield ""
    width = max(len(part.name) for part in seen.parts)
    yield f"{'part':{width}}  activation (rms)  parameters (norm)  gradient (norm)"
    for part in seen.parts:
        activation = "" if math.isnan(part.activation) else f"{part.activation:.4g}"
        note = _note(part.activation, part.gradient, part.parameter)
        yield f"{part.name:{width}}  {activation:>16}  {part.parameter:>17.4g}  {part.gradient:>15.4g}{note}"
    if seen.correct_by_distance:
        yield ""
        yield "right, by how many tokens back the answer stands:"
        below = 0
        for bin_, (right, count) in seen.correct_by_distance.items():
            yield f"  {f'{below + 1} to {bin_}':>14}  {right / count:6.1%}  of {count:,}"
            below = bin_
    yield ""
    yield "examples (tokens, the answer, the prediction):"
    for example in seen.examples:
        yield f"  {_example(example, seen)}"
    yield ""
    if not advice:
        yield (
            "nothing to advise: its answers are right"
            if seen.accuracy >= SOLVED
            else "nothing in its numbers tells what to try"
        )
    for piece in advice:
        yield f"{piece.why[:1].upper()}{piece.why[1:]}:"
        for command in piece.commands:
            yield f"    {command}"


def _note(activation: float, gradient: float, parameter: float) -> str:
    """Returns a mark for what is unusual."""
    if not math.isfinite(gradient) or math.isinf(activation):
        return "  not finite"
    if activation > LARGE:
        return "  large activations"
    if gradient > LARGE:
        return "  large gradient"
    return "  no gradient" if parameter and gradient < SMALL else ""


def _example(example: Example, seen: Look) -> str:
    right = "right" if example.predicted == example.label else "wrong"
    back = "" if example.distance is None else f", the answer {example.distance} tokens back"
    if seen.tokenizer is None:
        before = " ".join(map(str, example.before))
        return (
            f"... {before} -> {example.label}, predicted {example.predicted} ({example.probability:.0%}, {right}{back})"
        )
    before, label, predicted = (
        repr(seen.tokenizer.decode(ids)) for ids in (list(example.before), [example.label], [example.predicted])
    )
    return f"{before} -> {label}, predicted {predicted} ({example.probability:.0%}, {right}{back})"
