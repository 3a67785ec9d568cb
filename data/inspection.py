"""What is in a data set, as lines to read: splits, lengths, what the tokenizer does not know, and first documents; of a
recall task, examples with their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from recollect.data.batch import Batch, DataConfig
from recollect.data.text.dataset import Text

BARS = "▁▂▃▄▅▆▇█"
_BUCKETS = 24
_SHOWN = 160


def inspect_data(data: DataConfig, count: int) -> Iterator[str]:
    """Yields lines about a data set, with `count` documents or examples of each split or slice.

    Raises:
      UserError: the text cannot be read or prepared.
    """
    return _text(data, count) if isinstance(data, Text) else _task(data, count)


def _text(data: Text, count: int) -> Iterator[str]:
    prepared = data.prepared()
    tokenizer = prepared.tokenizer
    yield (
        f"{data.source}: tokenizer {tokenizer.name}, {data.vocabulary:,} ids; corpus sha256 {prepared.digest[:16]}; "
        f"rows of {data.length:,} tokens, {type(data.sequences).__name__}"
    )
    sizes = prepared.describe()
    for split, documents in (("train", prepared.train), ("held_out", prepared.held_out)):
        size, lengths, text = sizes[split], documents.lengths, ""
        if "bytes" in size:
            unknown = documents.unknown_bytes / max(size["bytes"], 1)
            text = f", {size['bytes']:,} bytes, {unknown:.3%} of them unknown"
        yield f"{split.replace('_', ' ')}: {size['documents']:,} documents, {size['tokens']:,} tokens{text}"
        yield f"  tokens per document: {spread(lengths)}"
        for number in range(min(count, len(documents))):
            shown = tokenizer.decode(documents.tokens(number, 0, _SHOWN))
            cut = "..." if lengths[number] > _SHOWN or len(shown) > _SHOWN else ""
            yield f"  {number + 1} ({int(lengths[number]):,} tokens): {shown[:_SHOWN]!r}{cut}"


def _task(task: Any, count: int) -> Iterator[str]:
    chance = task.result_entries().get("chance")
    guess = "" if chance is None else f", {task.metric} of a guess {chance:.2%}"
    yield f"{type(task).__name__}: {task.vocabulary:,} ids{guess}"
    yield "  an example's tokens; 7[->42] is labelled: at 7 the model should answer 42"
    for split, slices, draw in (
        ("train", task.train_slices(), task.train_batch),
        ("evaluation", task.evaluation_slices(), task.evaluation_batch),
    ):
        total = sum(part.weight for part in slices)
        for part in slices:
            share = (
                f"{part.weight / total:.0%} of training calls"
                if split == "train"
                else f"{task.evaluation_examples:,} examples" + ("" if part.weight else ", beside the mean")
            )
            batch = draw(0, 0, part, max(count, 1))
            labels = np.asarray(batch.weights > 0).sum(axis=1)
            yield f"{split} {part.name}: {share}, {part.length:,} tokens, labels per example: {spread(labels)}"
            for row in range(count):
                yield f"  {row + 1}: {example(batch, row, task.spelling)}"


def example(batch: Batch, row: int, spelling: Callable[[int], str] = str) -> str:
    """Returns the tokens of one row, with the target behind each labelled one: "5 7[->42] 5". Those of its source come
    first, where it has one: "7 42 => 7[->42]"."""
    tokens, targets = np.asarray(batch.tokens)[row], np.asarray(batch.targets)[row]
    weights = np.asarray(batch.weights)[row]
    positions = np.arange(len(targets)) if batch.target_positions is None else np.asarray(batch.target_positions)[row]
    answers = {int(at): int(target) for at, target, weight in zip(positions, targets, weights, strict=True) if weight}
    words = [spelling(int(token)) for token in tokens]
    source = [] if batch.source is None else [*(spelling(int(token)) for token in np.asarray(batch.source)[row]), "=>"]
    labelled = (f"{word}[->{spelling(answers[at])}]" if at in answers else word for at, word in enumerate(words))
    return " ".join([*source, *labelled])


def spread(numbers: Sequence[int] | np.ndarray) -> str:
    """Returns the smallest, median and largest of whole numbers, and a histogram between the outer ones (by powers
    where they differ much)."""
    values = np.asarray(numbers)
    low, high = int(values.min()), int(values.max())
    if low == high:
        return f"{low:,} each"
    wide = low > 0 and high > 20 * low
    edges = np.geomspace(low, high, _BUCKETS + 1) if wide else np.linspace(low, high, min(_BUCKETS, high - low + 1) + 1)
    edges[0], edges[-1] = low, high
    counts = np.histogram(values, edges)[0]
    heights = np.ceil(counts / counts.max() * len(BARS)).astype(int)
    bars = "".join(BARS[height - 1] if height else " " for height in heights)
    return f"min {low:,}, median {int(np.median(values)):,}, max {high:,}  |{bars}|{' (powers)' if wide else ''}"
