"""The README.md of an exported model: what it is, what it was trained on, how good it is, how it is loaded."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from recollect.export.huggingface.layouts import flash_linear_attention, rwkv7


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a model card reports of a run; None and {} where it is not known.

    Attributes:
      name: of the experiment.
      step: optimizer steps taken.
      batch_tokens: tokens of a batch.
      source, digest: of the corpus.
      results: metrics by name, those of the run's final evaluation.
      intervals: of 95 %, by the name of their metric.
      measured_on: what the metrics and their intervals are over, for example "64 held-out documents".
      config: JSON-ready, of the whole experiment.
      license: its identifier on the Hugging Face hub.
    """

    name: str
    step: int | None = None
    batch_tokens: int | None = None
    source: str | None = None
    digest: str | None = None
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    measured_on: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    license: str = "unknown"


def model_card(facts: Facts, layout: str, parameters: int, *, has_tokenizer: bool) -> str:
    """Returns the text of README.md; the same facts give the same bytes."""
    name = json.dumps(facts.name)
    front = f"license: {facts.license}\nlibrary_name: transformers\npipeline_tag: text-generation\nmodel_name: {name}"
    trained = []
    if facts.step is not None:
        of = f" of {facts.batch_tokens:,} tokens" if facts.batch_tokens else ""
        trained.append(f"{facts.step:,} steps{of}.")
    if facts.source is not None:
        digest = f" (sha256 of its documents {facts.digest[:16]}…)" if facts.digest else ""
        trained.append(f"Corpus: `{facts.source}`{digest}.")
    table = _results(facts) if facts.results else "Not evaluated by the run."
    load = 'AutoModelForCausalLM.from_pretrained("this/folder")'
    if layout in flash_linear_attention.CLASSES | rwkv7.CLASSES:
        load = f"import fla  # pip install flash-linear-attention\n    {load}"
    text = 'AutoTokenizer.from_pretrained("this/folder")' if has_tokenizer else "no tokenizer: inputs are token ids"
    return f"""---
{front}
---

# {facts.name}

A language model of {parameters:,} parameters, trained with Recollect and exported as `{layout}`.

## Training

{" ".join(trained) or "Not recorded."}

## Results

{table}

## Use

    {load}
    {text}

## Config

```json
{json.dumps(facts.config, indent=2)}
```
"""


def _results(facts: Facts) -> str:
    rows = ["| held-out metric | value | 95 % interval |", "|---|---|---|"]
    for metric, value in sorted(facts.results.items()):
        interval = facts.intervals.get(metric)
        shown = "-" if interval is None else f"{interval[0]:.6g} to {interval[1]:.6g}"
        rows.append(f"| {metric} | {value:.6g} | {shown} |")
    return "\n".join(rows) + (f"\n\nMeasured on {facts.measured_on}." if facts.measured_on else "")
