"""Run folders as training leaves them, written by hand."""

import json
from pathlib import Path
from typing import Any

from recollect.evaluation.results import RunResult, load_runs


def write_run(folder: Path, name: str = "mqar.based", rate: float = 1e-3, seed: int = 0, **changes: Any) -> Path:
    """One finished run; `changes` replace entries of result.json, `task`, `model`, `data`, `optimizer` and `curve`
    those of the other files."""
    model = changes.pop("model", {"class": "LanguageModel", "width": 64})
    optimizer = changes.pop("optimizer", {"class": "AdamW", "learning_rate": rate})
    curve = changes.pop("curve", [(100, 0.1), (200, changes.get("accuracy", 0.5))])
    folder.mkdir(parents=True)
    run = {"class": "Run", "seed": seed, "steps": 200, "batch_size": 64, "directory": str(folder)}
    config = {
        "schema_version": 1,
        "class": "Experiment",
        "name": name,
        "task": changes.pop("task", ""),
        "model": model,
        "data": changes.pop("data", {"class": "MQAR"}),
        "optimizer": optimizer,
        "run": run,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "metrics.jsonl").open("w") as file:
        for step, accuracy in curve:
            file.write(json.dumps({"step": step, "loss": 2.0, "accuracy": 0.9, "seconds": 1.0}) + "\n")
            file.write(
                json.dumps({"step": step, "evaluation": {"accuracy": accuracy, "loss": 1 - accuracy}, "seconds": 1.0})
                + "\n"
            )
    accuracy = changes.get("accuracy", 0.5)
    by_slice = {} if accuracy is None else {"128x8": accuracy / 2, "64x16": accuracy, "64x4": accuracy}
    result = {
        "name": name,
        "accuracy": accuracy,
        "accuracy_by_slice": by_slice,
        "loss_by_slice": {"64x4": 0.25},
        "loss": 0.1 + 0.2,
        "steps": 200,
        "seconds": 10.5,
        "examples_per_second": 1000.0,
        "tokens_per_second": 64000.0,
        "parameters": 54400,
        "state_bytes": {"64": 12468, "128": 13000, "1024": 99999},
        "chance": 1 / 128,
        "status": "finished",
        "learning_rate": rate,
        "seed": seed,
        "overrides": {"optimizer.learning_rate": rate, "run.seed": seed},
        **changes,
    }
    (folder / "result.json").write_text(json.dumps({key: value for key, value in result.items() if value is not None}))
    return folder


def study(root: Path, scores: dict[str, float]) -> list[RunResult]:
    """Two learning rates (the second is better) and two seeds an architecture."""
    folders = []
    for index, (name, score) in enumerate(scores.items()):
        for rate, factor in ((1e-3, 0.5), (3e-3, 1.0)):
            for seed in (0, 1):
                state = {"64": 700 * 2**index, "128": 800 * 2**index}
                folders.append(
                    write_run(
                        root / f"{name}-{rate}-{seed}", name, rate, seed, accuracy=score * factor, state_bytes=state
                    )
                )
    return load_runs(folders)
