"""Bits a byte on held-out text, whole and by slice.

Recall hits are bytes that complete an 8-gram seen earlier in their segment and that an order-7 table of the training documents does
not predict (data/ngrams.py): what a model must read off its own context. A bigram model fitted to the same training documents
is measured on the same targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from data.batch import Batch
from data.ngrams import recall_slice
from data.text import Text


def evaluate_text(losses: Callable[[Batch], np.ndarray], data: Text, batch_size: int, *, final: bool) -> dict[str, Any]:
    """Evaluates on the held-out batches of `data`.

    Args:
      losses: cross-entropy (b, t) in nats of a batch's targets.
      final: also the slices and the bigram model (fitting the order-7 table reads the whole training split).

    Returns:
      "bits_per_byte" and "loss" (nats); with `final` also "bits_by_slice" ("recall", "rest"), "share_by_slice",
      "bigram_bits_per_byte" and "bytes".
    """
    total: dict[str, float] = {}

    def add(name: str, nats: np.ndarray, weights: np.ndarray) -> None:
        total[name] = total.get(name, 0.0) + float(np.sum(np.where(weights > 0, nats * weights, 0)))
        total[f"{name} weight"] = total.get(f"{name} weight", 0.0) + float(weights.sum())

    for batch in data.evaluation_batches(batch_size):
        nats = np.asarray(losses(batch), np.float64)
        weights = np.asarray(batch.weights, np.float64)
        add("all", nats, weights)
        if final:
            hits = recall_slice(np.asarray(batch.tokens), np.asarray(batch.segments), data.ngram_table())
            add("recall", nats, weights * hits)
            add("rest", nats, weights * ~hits)
            add("bigram", data.bigram().loss(np.asarray(batch.tokens), np.asarray(batch.targets)), weights)

    def bits(name: str) -> float | None:
        weight = total[f"{name} weight"]
        return total[name] / weight / math.log(2) if weight else None

    found: dict[str, Any] = {"bits_per_byte": bits("all"), "loss": total["all"] / max(total["all weight"], 1.0)}
    if final:
        found["bits_by_slice"] = {name: bits(name) for name in ("recall", "rest")}
        found["share_by_slice"] = {name: total[f"{name} weight"] / total["all weight"] for name in ("recall", "rest")}
        found["bigram_bits_per_byte"] = bits("bigram")
        found["bytes"] = int(total["all weight"])
    return found
