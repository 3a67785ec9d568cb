"""Bits a byte on held-out text, whole and by slice.

Bits a byte: cross-entropy in nats / ln 2, summed over targets and divided by the bytes of text that the targets stand
for, so that numbers compare between tokenizers. `loss` is nats a target, which doesn't. Recall hits are targets that a
model must read off its own context (evaluation/ngram_baselines.py says which, for bytes and for other tokenizers). A
bigram model fitted to the training documents is measured on the same targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from recollect.data.batch import Batch
from recollect.data.text.dataset import Text


def evaluate_text(losses: Callable[[Batch], np.ndarray], data: Text, batch_size: int, *, final: bool) -> dict[str, Any]:
    """Evaluates on the held-out batches of `data`.

    Args:
      losses: cross-entropy (b, t) in nats of a batch's targets.
      final: also the slices and the bigram model (fitting them reads training documents).

    Returns:
      "bits_per_byte" and "loss" (nats a target); with `final` also "bits_by_slice" ("recall", "rest"), "share_by_slice"
      (of targets), "bigram_bits_per_byte", "bytes" and "targets" (how many were measured) and "baseline_tokens"
      (training tokens that the bigram model and the slices' n-gram model were fitted to).
    """
    sizes = data.open_tokenizer().token_bytes
    total: dict[str, np.ndarray] = {}

    def add(name: str, nats: np.ndarray, weights: np.ndarray, sizes: np.ndarray) -> None:
        sums = [np.sum(np.where(weights > 0, nats * weights, 0)), weights.sum(), np.sum(weights * sizes)]
        total[name] = total.get(name, np.zeros(3)) + np.array(sums)

    for batch in data.evaluation_batches(batch_size):
        nats = np.asarray(losses(batch), np.float64)
        weights, of_target = np.asarray(batch.weights, np.float64), sizes[np.asarray(batch.targets)]
        add("all", nats, weights, of_target)
        if final:
            hits = data.recall_hits(batch)
            add("recall", nats, weights * hits, of_target)
            add("rest", nats, weights * ~hits, of_target)
            add("bigram", data.bigram().loss(np.asarray(batch.tokens), np.asarray(batch.targets)), weights, of_target)

    def bits(name: str) -> float | None:
        nats, _, size = total[name]
        return float(nats / size / math.log(2)) if size else None

    nats, targets, size = total["all"]
    found: dict[str, Any] = {"bits_per_byte": bits("all"), "loss": float(nats / max(targets, 1.0))}
    if final:
        found["bits_by_slice"] = {name: bits(name) for name in ("recall", "rest")}
        found["share_by_slice"] = {name: float(total[name][1] / max(targets, 1.0)) for name in ("recall", "rest")}
        found["bigram_bits_per_byte"] = bits("bigram")
        found |= {"bytes": int(size), "targets": int(targets), "baseline_tokens": data.bigram().tokens}
    return found
