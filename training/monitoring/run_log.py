"""The log of a run: metrics.jsonl, and lines on the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import chz
import jax
import numpy as np

from recollect.configuration.console import NOW, doing
from recollect.data.batch import Batch
from recollect.layers.mixer import Context
from recollect.models.functional import FunctionalModel, Params, count
from recollect.models.language_model import LanguageModel
from recollect.models.stack import Stage
from recollect.pallas_kernels import dispatch
from recollect.training.batches import Call
from recollect.training.hooks import Hook
from recollect.training.run_state import RunState


class RunLog(Hook):
    """Logs a run's steps on `run.log_every` and its last, with rates since the record before, and its evaluations."""

    def __init__(self, run: RunState):
        self._last: Call | None = None
        if run.experiment.run.tensorboard or run.experiment.run.wandb:
            from recollect.training.monitoring.boards import open_boards

            run.folder.boards = open_boards(run.experiment, run.folder.path)

    def begin(self, run: RunState, parameters: int | None = None, population: int | None = None) -> None:
        """Logs what is trained, on what device and by which operations."""
        experiment = run.experiment
        parameters = count(run.state["params"]) if parameters is None else parameters
        together = f", {population} members at once" if population else ""
        if experiment.model.lora is not None or experiment.optimizer.frozen:
            from recollect.models.accounting import trainable_parameters

            together = f", {trainable_parameters(run.program.model):,} of them trained{together}"
        run.log(
            f"{experiment.name}: {parameters:,} parameters on {jax.devices()[0].device_kind}{together}, "
            f"{experiment.run.steps:,} steps -> {run.folder.path}"
        )
        for line in operations_by_mixer(experiment.model, experiment.data.batch_shapes(experiment.run.batch_size)):
            run.log(f"  {line}")
        if corpus := experiment.data.result_entries().get("corpus"):
            unit, digest = "bytes" if "bytes" in corpus["train"] else "tokens", corpus["digest"][:16]
            run.log(f"  corpus {corpus['source']}: {corpus['train'][unit]:,} {unit} to train on, sha256 {digest}")

    def after_call(self, run: RunState, call: Call) -> None:
        self.steps(run, call)
        self.show(run, call)

    def end(self, run: RunState) -> None:
        if self._last is not None and self._last.end % run.experiment.run.log_every:
            self.steps(run, self._last, every=self._last.end)

    def steps(self, run: RunState, call: Call, rates: Mapping[str, float] | None = None, every: int = 0) -> None:
        """Logs a call's steps on `every` (0: `log_every`), with `rates` since the last record (None: the meter's)."""
        every = every or run.experiment.run.log_every
        if call.crosses(every):
            speed = {"throughput": dict(rates_since_log(run) if rates is None else rates)}
            for step in range((call.end - call.length) // every * every + every, call.end + 1, every):
                values = {name: float(row[step - call.end - 1]) for name, row in call.metrics.items()}
                run.folder.log({"step": step, **values, "seconds": round(run.progress.seconds, 3), **speed})

    def show(self, run: RunState, call: Call) -> None:
        """Shows how far the run is, with the last step's loss (the mean over members); logs its first call."""
        steps = run.experiment.run.steps

        def status() -> str:
            loss, norm = (np.mean(call.metrics[name][..., -1]) for name in ("loss", "gradient_norm"))
            rates, skipped = run.meter.since("line"), np.count_nonzero(call.metrics["skipped"])
            text = f"{skipped} of {call.length} steps skipped, " if skipped else ""
            return f"{text}loss {loss:.4f}, gradient norm {norm:.3g}" + (f", {rates.text()}" if rates else "")

        doing(f"step {call.end:,}/{steps:,}", (call.end, steps, status))
        if self._last is None:
            run.log(f"  step {call.end:,}/{steps:,} {status()}")
        self._last = call

    def evaluation(self, run: RunState, metrics: dict[str, Any]) -> None:
        """Logs an evaluation."""
        step = run.progress.step
        run.folder.log({"step": step, "evaluation": metrics, "seconds": round(run.progress.seconds, 3)})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        run.log(f"  {'/'.join(run.folder.path.parts[-2:])} step {step:,}: {shown}")

    def close(self, run: RunState) -> None:
        NOW.job = None
        for board in run.folder.boards:
            board.close()


def rates_since_log(run: RunState) -> dict[str, float]:
    """Returns the run's rates since this was last called."""
    return {} if (rates := run.meter.since("log")) is None else rates.facts()


def operations_by_mixer(config: LanguageModel, batch: Batch) -> list[str]:
    """Returns a line per kind of mixer and operation: its backend, and why this platform's kernel was passed over.

    Each kind of mixer is traced alone, forward only, for the device that is traced for now; of the batch only shapes
    are needed (`DataConfig.batch_shapes`).
    """
    lines = []
    kernel = f"pallas_{dispatch.device().platform}"
    for mixer, layers in Counter(config.mixers).items():
        model = FunctionalModel(chz.replace(config, stages=(Stage(pattern=(mixer,)),), lora=None), 2)

        def run(params: Params, batch: Batch, model: FunctionalModel = model) -> jax.Array:
            return model.bind(params).hidden(batch.tokens, Context(segments=batch.segments)).hidden

        with dispatch.recorded_choices() as choices:
            jax.eval_shape(run, model.abstract_params(), batch)
        name = type(mixer).__name__ + (f" in {layers} layers" if layers > 1 else "")
        for choice, times in Counter(choices).items():
            often = f", {times} times" if times > 1 else ""
            reasons = "".join(f" (not {backend}: {why})" for backend, why in choice.passed_over if backend == kernel)
            lines.append(f"{name}: {choice.operation} on {choice.backend}{often}{reasons}")
    return lines
