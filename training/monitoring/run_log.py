"""The log of a run: metrics.jsonl, and lines on the console, with rates: tokens per second, seconds per step, MFU (its
products as a share of the devices' peak), and the share of time spent waiting for data.

    MFU = 3 * forward products per token * tokens per second / (devices * dense bf16 peak of one)

as in PaLM (Chowdhery et al. 2022, appendix B): the backward pass has two products for each of the forward pass; what
rematerialisation computes again does not count. Forward products: model_flops.py. CPUs and unknown chips have no MFU.
Evaluation, checkpoints and samples do not count; neither do seconds of a call of steps in which XLA compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import chz
import jax
import numpy as np

from recollect.configuration.console import NOW, doing
from recollect.data.batch import Batch
from recollect.models.functional import FunctionalModel, Params, count
from recollect.models.language_model import LanguageModel
from recollect.models.stack import Stage
from recollect.pallas_kernels import dispatch
from recollect.training.batches import Call
from recollect.training.experiment import Experiment
from recollect.training.hooks import Hook
from recollect.training.loss import context_of
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
        trained = f"{experiment.name}: {parameters:,} parameters on {jax.devices()[0].device_kind}{together}"
        run.log(f"{trained}, {experiment.run.steps:,} steps -> {run.folder.path}")
        for line in operations_by_mixer(experiment.model, experiment.data.batch_shapes(experiment.run.batch_size)):
            run.log(f"  {line}")
        if experiment.optimizer.decay_steps is None and experiment.optimizer.warmup > experiment.run.steps:
            run.log(f"  optimizer.warmup={experiment.optimizer.warmup:,}: no step reaches the peak learning rate")
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
        encoder = config.encoder if mixer.traits.cross else None
        model = FunctionalModel(chz.replace(config, stages=(Stage(pattern=(mixer,)),), lora=None, encoder=encoder), 2)

        def run(params: Params, batch: Batch, model: FunctionalModel = model) -> jax.Array:
            return model.bind(params).hidden(batch.tokens, context_of(batch)).hidden

        with dispatch.recorded_choices() as choices:
            jax.eval_shape(run, model.abstract_params(), batch)
        name = type(mixer).__name__ + (f" in {layers} layers" if layers > 1 else "")
        for choice, times in Counter(choices).items():
            often = f", {times} times" if times > 1 else ""
            reasons = "".join(f" (not {backend}: {why})" for backend, why in choice.passed_over if backend == kernel)
            lines.append(f"{name}: {choice.operation} on {choice.backend}{often}{reasons}")
    return lines


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates over some device calls: tokens of all devices and members together, seconds of a step with its waiting for
    data, the share of that in the time, and MFU (None where the peak is not known), both from 0 to 1."""

    tokens_per_second: float
    step_seconds: float
    waiting_for_data: float
    mfu: float | None

    def facts(self) -> dict[str, float]:
        """Returns the rates by name, JSON-ready; without "mfu" where there is none."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def text(self) -> str:
        """Returns "12,345 tokens/s, 1.66 s per step, MFU 41.0%, 0.1% waiting for data"."""
        step = f"{self.step_seconds:.3g} s" if self.step_seconds >= 1 else f"{1e3 * self.step_seconds:.3g} ms"
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        waiting = f"{self.waiting_for_data:.1%} waiting for data"
        return f"{self.tokens_per_second:,.0f} tokens/s, {step} per step{mfu}, {waiting}"


class Meter(Hook):
    """Adds up device calls and returns rates, of the whole session and since a reader last asked.

    Args:
      flops_per_token: of one training step, per token (see the module); None: no MFU.
      peak: floating-point operations per second of all devices together; None: no MFU.
    """

    def __init__(self, flops_per_token: float | None = None, peak: float | None = None):
        self.flops_per_token = flops_per_token
        self.peak = peak
        self._total = np.zeros(4)  # steps, tokens, seconds, seconds of waiting
        self._read: dict[str, np.ndarray] = {}
        self._reported = time.perf_counter()
        _listen()

    def after_call(self, run: RunState, call: Call) -> None:
        examples = call.length * run.experiment.run.batch_size * (run.program.population or 1)
        tokens = examples * run.experiment.data.tokens_per_example
        self.step(call.length, tokens, call.seconds, min(call.waited, call.seconds))

    def step(self, steps: int, tokens: float, seconds: float, waited: float = 0.0) -> None:
        """Adds the device call that has just ended, with tokens of all rows (and members) together. It took `seconds`
        from before its data were asked for (or the last call's metrics had arrived, if that was later) until its
        metrics had arrived, of which it `waited` some for data."""
        end = time.perf_counter()
        compiling = min(_compiled_between(max(end - seconds, self._reported), end), seconds - waited)
        self._reported = end
        self._total = self._total + (steps, tokens, seconds - compiling, waited)

    def since(self, reader: str) -> Rates | None:
        """Returns rates since this reader last asked (at first: since the beginning); None when no step was added."""
        before = self._read.get(reader, np.zeros(4))
        self._read[reader] = self._total
        return self._rates(self._total - before)

    def total(self) -> Rates | None:
        """Returns rates over all calls; None when there was none."""
        return self._rates(self._total)

    def _rates(self, sums: np.ndarray) -> Rates | None:
        steps, tokens, seconds, waited = map(float, sums)
        if not steps:
            return None
        seconds = max(seconds, 1e-9)
        rate = tokens / seconds
        mfu = None if self.flops_per_token is None or self.peak is None else rate * self.flops_per_token / self.peak
        return Rates(rate, seconds / steps, min(1.0, waited / seconds), mfu)


def meter_of(experiment: Experiment) -> Meter:
    """Returns the meter of a run on this machine's devices."""
    if jax.default_backend() == "cpu":
        return Meter()
    from recollect.training.monitoring.chips import chip_of
    from recollect.training.monitoring.model_flops import training_flops_per_token

    chip = chip_of(jax.devices()[0].device_kind)
    if chip is None:
        return Meter()
    return Meter(training_flops_per_token(experiment), chip.flops * experiment.run.mesh.devices)


_compilations: list[tuple[float, float]] = []


@functools.cache  # jax keeps listeners for good, so there is one
def _listen() -> None:
    """Notes from now on when this process compiles."""
    jax.monitoring.register_event_duration_secs_listener(_note)


def _note(event: str, duration_secs: float, **_: Any) -> None:
    if not event.startswith("/jax/core/compile/"):
        return
    end = time.perf_counter()
    begin = end - duration_secs
    # What lies within what was noted just now (an inner function's trace) counts once.
    while _compilations and _compilations[-1][0] >= begin:
        _compilations.pop()
    if _compilations and _compilations[-1][1] > begin:
        begin = _compilations.pop()[0]
    _compilations.append((begin, end))
    del _compilations[:-1000]


def _compiled_between(begin: float, end: float) -> float:
    """Returns the seconds of compilation in an interval of time.perf_counter()."""
    return sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in _compilations)
