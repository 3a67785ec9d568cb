"""What a run tells: metrics.jsonl always, TensorBoard when asked, and lines on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.training.experiment import Experiment
from recollect.training.monitoring.throughput import Meter
from recollect.training.run_folder import RunFolder


class Reporter:
    """Reports for the members of one session; with a meter, also how fast they go."""

    def __init__(
        self, folders: list[RunFolder], experiment: Experiment, say: Callable[[str], None], meter: Meter | None = None
    ):
        self.folders = folders
        self.experiment = experiment
        self.say = say
        self.meter = meter
        self._last_line = 0.0
        self._bar: Any = None
        self._boards = [_tensorboard(folder) for folder in folders] if experiment.run.tensorboard else []

    def banner(self, parameters: int, device: Any, population: int | None, operations: list[str]) -> None:
        many = f", {population} members at once" if population else ""
        self.say(
            f"{self.experiment.name}: {parameters:,} parameters on {device.device_kind}{many}, {self.experiment.run.steps:,} steps -> {self.folders[0].path}"
        )
        for line in operations:
            self.say(f"  {line}")

    def steps(self, step: int, metrics: dict[str, np.ndarray], active: list[bool], seconds: list[float]) -> None:
        """Logs the steps of one call that fall on `log_every`; metrics are (steps,) or (members, steps).

        A record's "throughput" is over the calls since the record before it.
        """
        length = np.asarray(metrics["loss"]).shape[-1]
        every = self.experiment.run.log_every
        logs = step // every > (step - length) // every
        rates = self.meter.since("log") if self.meter is not None and logs else None
        speed = {} if rates is None else {"throughput": rates.facts()}
        for index, folder in enumerate(self.folders):
            if not active[index]:
                continue
            rows = {name: np.asarray(value).reshape(-1, length)[index] for name, value in metrics.items()}
            for offset in range(length):
                at = step - length + offset + 1
                if at % every == 0:
                    values = {name: float(row[offset]) for name, row in rows.items()}
                    folder.log({"step": at, **values, "seconds": round(seconds[index], 3), **speed})
                    self._board(
                        index,
                        at,
                        {
                            **values,
                            **{f"throughput/{name}": value for name, value in speed.get("throughput", {}).items()},
                        },
                    )
        self._progress(step, metrics)

    def evaluation(self, index: int, step: int, found: dict[str, Any], seconds: float) -> None:
        self.folders[index].log({"step": step, "evaluation": found, "seconds": round(seconds, 3)})
        self._board(
            index, step, {f"evaluation/{name}": value for name, value in found.items() if isinstance(value, float)}
        )
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
        self._line(f"  {self.folders[index].path.name} step {step:,}: {shown}")

    def sample(self, text: str) -> None:
        self._line("  sample: " + text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for board in self._boards:
            board.close()

    def _progress(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        shown: list[str] = [name for name in ("loss", "gradient_norm") if name in metrics]
        last = {name: float(np.mean(np.asarray(metrics[name])[..., -1])) for name in shown}
        if sys.stderr.isatty():
            import tqdm

            if self._bar is None:
                self._bar = tqdm.tqdm(total=self.experiment.run.steps, unit="step", leave=False)
            self._bar.update(step - self._bar.n)
            if time.monotonic() - self._last_line > 1:
                self._last_line = time.monotonic()
                self._bar.set_postfix_str(self._status(last))
        elif time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            self.say(f"  step {step:,}/{self.experiment.run.steps:,} {self._status(last)}")

    def _status(self, last: dict[str, float]) -> str:
        """ "loss 1.2345, gradient norm 0.51, 12,345 tokens/s, ..."; rates since the line before it."""
        parts = [f"loss {last['loss']:.4f}"]
        if "gradient_norm" in last:
            parts.append(f"gradient norm {last['gradient_norm']:.3g}")
        rates = None if self.meter is None else self.meter.since("line")
        return ", ".join(parts if rates is None else [*parts, rates.text()])

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        self.say(text)

    def _board(self, index: int, step: int, record: dict[str, Any]) -> None:
        if self._boards:
            for name, value in record.items():
                if isinstance(value, float):
                    self._boards[index].add_scalar(name, value, step)


def _tensorboard(folder: RunFolder) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("run.tensorboard=True needs the package tensorboardX, which is not installed") from None
    return SummaryWriter(str(folder.path))
