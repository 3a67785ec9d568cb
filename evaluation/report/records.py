"""What one run folder shows, however far its run is: finished, in training, failed or damaged."""

from __future__ import annotations

import dataclasses
import math
import shlex
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.configuration.read_json import read_json_object
from recollect.evaluation.curves import LearningCurve, TrainingCurve, learning_curve, training_curve
from recollect.evaluation.results import RunResult, load_run
from recollect.evaluation.table import format_chance

ENDED = ("finished", "stopped early", "diverged")


@dataclasses.dataclass
class Record:
    """One run folder: its result, the files that was read from, and what is wrong with it."""

    result: RunResult
    written: dict[str, Any]
    environment: dict[str, Any]
    evaluations: LearningCurve
    training: TrainingCurve
    message: str

    def entries(self, points: int) -> dict[str, Any]:
        """Returns the run's entry of the page; curves have at most `points` points."""
        run, folder = self.result, self.result.folder
        return {
            "id": f"{zlib.crc32(str(folder).encode()):08x}",
            "name": run.name,
            "folder": str(folder),
            "mixer": run.mixer,
            "status": run.status,
            "message": self.message,
            "metric": run.metric,
            "score": run.score,
            "loss": run.loss,
            "chance": run.chance,
            "chance_text": None if run.chance is None else format_chance(run.chance),
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "steps": run.steps,
            "steps_asked": run.config.get("run", {}).get("steps"),
            "seconds": run.seconds,
            "tokens_per_second": run.tokens_per_second,
            "parameters": run.parameters or None,
            "evaluations": _thinned(self.evaluations, points, ("steps", "score", "loss")),
            "training": _thinned(self.training, points, ("steps", "loss")),
            **self._commands(),
        }

    def _commands(self) -> dict[str, Any]:
        """Returns "command", the line that started the run ("" where none was kept), and "more": those that look at
        it."""
        folder = shlex.quote(str(self.result.folder))
        started = self.environment.get("command")
        command = shlex.join(["recollect", *map(str, started[1:])]) if isinstance(started, list) else ""
        lines = []
        if self.written.get("status") in ENDED:
            lines.append(f"recollect evaluate {folder}")
        failure = self.written.get("failure") or {}
        if "folder" in failure:
            lines.append(f"recollect replay {shlex.quote(str(failure['folder']))}")
        return {"command": command, "more": lines}


def read_record(folder: Path) -> Record:
    """Returns what a folder holds, however far its run is; raises UserError where its config.json is broken."""
    config = read_json_object(folder / "config.json")
    evaluations, training, broken = _curves(folder)
    written, environment, message, result = {}, {}, broken, None
    try:
        environment = read_json_object(folder / "environment.json") if (folder / "environment.json").exists() else {}
        written = read_json_object(folder / "result.json") if (folder / "result.json").exists() else {}
        if written.get("status") in ENDED:
            result, message = load_run(folder), _failure(written) or broken
    except UserError as error:
        message = str(error)
    result = result or _unfinished(folder, config, evaluations, training, message)
    return Record(result, written, environment, evaluations, training, message)


def _curves(folder: Path) -> tuple[LearningCurve, TrainingCurve, str]:
    """Returns a run's evaluations and logged steps, both empty where there are none or a line of metrics.jsonl is
    broken, and the message about that line."""
    try:
        return learning_curve(folder), training_curve(folder), ""
    except UserError as error:
        none = np.zeros(0)
        broken = str(error) if (folder / "metrics.jsonl").exists() else ""
        return LearningCurve(none, none, none), TrainingCurve(none, none, none, none), broken


def _unfinished(
    folder: Path, config: dict[str, Any], evaluations: LearningCurve, training: TrainingCurve, message: str
) -> RunResult:
    """Returns as much of a result as a run that has not ended (or whose result is damaged) has shown."""
    last = float(evaluations.score[-1]) if len(evaluations.score) else math.nan
    metric = evaluations.metric or ("bits_per_byte" if "tokenizer" in config.get("data", {}) else "accuracy")
    return RunResult(
        folder=folder,
        name=str(config.get("name", folder.name)),
        status="damaged" if message else "not finished",
        steps=int(training.steps[-1]) if len(training.steps) else 0,
        seconds=math.nan,
        parameters=0,
        learning_rate=float(config.get("optimizer", {}).get("learning_rate", math.nan)),
        seed=int(config.get("run", {}).get("seed", 0)),
        metric=metric,
        scores={metric: last},
        config=config,
    )


def _failure(written: dict[str, Any]) -> str:
    """Returns what went wrong in a run that ended, "" where nothing did."""
    failure, skipped = written.get("failure"), written.get("skipped_steps")
    if failure:
        return f"step {failure.get('step')}: {failure.get('found')}"
    return f"{skipped:,} steps were skipped: their loss or gradient was not finite" if skipped else ""


def _thinned(curve: LearningCurve | TrainingCurve, points: int, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Returns columns of a curve, evenly thinned to `points`, with the last one."""
    last = len(curve.steps) - 1
    kept = np.unique(np.linspace(0, last, min(last + 1, points)).round().astype(int))
    steps: list[float] = [int(step) for step in curve.steps[kept]]
    others = {name: [float(f"{value:.5g}") for value in getattr(curve, name)[kept]] for name in names[1:]}
    return {"steps": steps, **others}
