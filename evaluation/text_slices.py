"""Bits per byte on held-out text, whole and by slice.

Bits per byte: cross-entropy in nats / ln 2, summed over targets and divided by the bytes of text that the targets stand
for, so that numbers compare between tokenizers. A token for the unknown says nothing of what it stands for, so each
byte of it counts 8 bits more: what spelling it would take. `loss` is nats per target, which doesn't compare. Recall
hits are targets that a model must read off its own context (evaluation/ngram_baselines.py defines them, for bytes and
for other tokenizers). Positions are in powers of two: how many tokens of its document a target is predicted from. A
bigram model fitted to the training documents is measured on the same targets.
"""

import collections
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from recollect.configuration.console import doing
from recollect.data.batch import Batch
from recollect.data.text.dataset import Text
from recollect.evaluation.intervals import ratio_interval
from recollect.evaluation.ngram_baselines import fit_bigram, recall_hits


def evaluate_text(
    losses: Callable[[Batch], Float[np.ndarray, "b t"]], data: Text, batch_size: int, *, final: bool
) -> dict[str, Any]:
    """Returns metrics on the held-out batches of `data`.

    Args:
      losses: cross-entropy in nats of a batch's targets.
      data: the text.
      batch_size: rows per batch.
      final: also the slices and the bigram model (fitting them reads training documents).

    Returns:
      "bits_per_byte" ("bits_per_token" of ids whose text is not known) and "loss" (nats per target); with `final` also
      "perplexity_by_position" ("1", "2-3", "4-7", ...: tokens of its document and row that a target is predicted
      from), "unknown" (where the tokenizer has a token for it: how many targets are that token, and their bytes),
      "bits_by_slice" ("recall", "rest"), "share_by_slice" (of targets), "bigram_bits_per_byte", "bytes" and "targets"
      (how many were measured; a token across the end of the text counts by its share inside), "documents" (how many of
      them these are of), "intervals" (of bits and loss over documents, see `ratio_interval`) and "baseline_tokens"
      (training tokens that the bigram model and the slices' n-gram model were fitted to).
    """
    unknown = data.open_tokenizer().unknown
    # Nats, targets, bytes, and bytes that are unknown.
    totals: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(4))
    by_document = np.zeros((len(data.prepared().held_out) if final else 0, 4))
    for number, (batch, sizes, documents) in enumerate(data.measured_batches(batch_size), 1):
        doing(f"evaluating held-out text, batch {number:,}")
        nats, targets = np.asarray(losses(batch), np.float64), np.asarray(batch.targets)
        weights = np.asarray(batch.weights, np.float64)
        spelt = np.where(targets == unknown, sizes, 0) if unknown is not None else np.zeros_like(sizes)
        parts = {"all": (nats, weights)} | (
            {} if unknown is None else {"unknown": (nats, weights * (targets == unknown))}
        )
        if final:
            hits = recall_hits(data.prepared(), batch)
            baseline = fit_bigram(data.prepared()).loss(np.asarray(batch.tokens), targets)
            depths = _tokens_before(np.asarray(batch.segments))
            parts |= {f"position {d}": (nats, weights * (depths == d)) for d in range(depths.max() + 1)}
            parts |= {"recall": (nats, weights * hits), "rest": (nats, weights * ~hits), "bigram": (baseline, weights)}
            of_target = np.stack([np.where(weights > 0, nats, 0), np.ones_like(nats), sizes, spelt], axis=-1)
            np.add.at(by_document, documents, of_target * weights[..., None])
        for name, (nats, counted) in parts.items():
            sums = [np.where(counted > 0, nats * counted, 0).sum(), *((counted * n).sum() for n in (1, sizes, spelt))]
            totals[name] += sums

    def bits(name: str) -> float | None:
        nats, _, size, spelt = totals[name]
        return float((nats / math.log(2) + 8 * spelt) / size) if size else None

    def intervals() -> dict[str, tuple[float, float]]:
        nats, number, size, spelt = by_document[by_document[:, 1] > 0].T
        of = {
            f"bits_per_{unit}": ratio_interval(nats / math.log(2) + 8 * spelt, size),
            "loss": ratio_interval(nats, number),
        }
        return {name: interval for name, interval in of.items() if interval is not None}

    total_nats, count, size, _ = totals["all"]
    unit = "byte" if data.prepared().counts_bytes else "token"
    metrics: dict[str, Any] = {f"bits_per_{unit}": bits("all"), "loss": float(total_nats / max(count, 1.0))}
    if final:
        if unknown is not None:
            metrics["unknown"] = {"targets": round(totals["unknown"][1]), "bytes": round(totals["unknown"][2])}
        by_position = {f"{1 << d}-{(2 << d) - 1}" if d else "1": totals[f"position {d}"] for d in range(64)}
        metrics |= {
            "perplexity_by_position": {
                name: float(np.exp(nats / number)) for name, (nats, number, *_) in by_position.items() if number
            },
            "bits_by_slice": {name: bits(name) for name in ("recall", "rest")},
            "share_by_slice": {name: float(totals[name][1] / max(count, 1.0)) for name in ("recall", "rest")},
            f"bigram_bits_per_{unit}": bits("bigram"),
            **({"bytes": round(size)} if unit == "byte" else {}),
            "targets": round(count),
            "documents": int(np.count_nonzero(by_document[:, 1])),
            "intervals": intervals(),
            "baseline_tokens": fit_bigram(data.prepared()).tokens,
        }
    return metrics


def _tokens_before(segments: np.ndarray) -> np.ndarray:
    """Returns log2, rounded down, of how many tokens of its document a target is predicted from: those of the row up to
    the token before it."""
    at = np.arange(segments.shape[1])
    first = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return np.log2(at - np.maximum.accumulate(np.where(first, at, 0), axis=1) + 1).astype(int)
