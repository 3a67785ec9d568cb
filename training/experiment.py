"""The config of a run: a model, data, an optimizer and how long. Functions in experiments/ return one."""

from __future__ import annotations

from typing import Literal

import chz

from recollect.configuration import Config, UserError, at_least, requires
from recollect.data.batch import DataConfig
from recollect.models.language_model import LanguageModel
from recollect.training import adafactor, lion, muon, sgd  # noqa: F401 - so that their configs are known by name
from recollect.training.loss import Loss
from recollect.training.optimizer import AdamW, Optimizer
from recollect.training.recovery.loss_spikes import Spikes

_devices = requires(lambda value: value >= 1, "an axis of run.mesh must have at least 1 device")


@chz.chz(typecheck=True)
class Mesh(Config):
    """Devices along each mesh axis. Their product is the number of devices used; 1 everywhere runs on one."""

    data: int = chz.field(default=1, validator=_devices)
    fsdp: int = chz.field(default=1, validator=_devices)
    tensor: int = chz.field(default=1, validator=_devices)
    sequence: int = chz.field(default=1, validator=_devices)

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor * self.sequence


@chz.chz(typecheck=True)
class Run(Config):
    """How a run goes.

    Attributes:
      steps: optimizer steps.
      batch_size: sequences per step.
      accumulate: parts that a batch is split into, whose gradients are added up, to fit memory. The step is the whole
        batch's. Auxiliary losses are formed from sums over all parts: with them each part runs forward once more.
      carry_state: a batch's rows go on from the model's state after the batch before (training/carried_state.py).
      seed: seed of parameters and data.
      directory: run folder; None: runs/NAME.
      steps_per_call: steps in one device call.
      log_every, evaluate_every, checkpoint_every: steps; rounded up to whole calls.
      keep_checkpoints: how many of the newest stay.
      keep_every: the first checkpoint at or after each multiple of this many steps is kept permanently; None: none.
      on_disk_full: what a run does when a checkpoint or its metrics cannot be written: "stop" ends it (exit code 2),
        "continue" trains on and tries again at the next checkpoint. The last good checkpoint stays either way.
      stop_at_accuracy: end the run once the evaluation's accuracy is at least this; None never does.
      precision: precision of fp32 matrix products; "highest" makes CPU and GPU tables agree.
      mesh: devices.
      sample_every: steps between printed samples of a text model; 0 prints none.
      tensorboard, wandb: write event files too; log to Weights & Biases too (docs/workflows/read_a_run.md).
      stop_after_nonfinite: steps in a row whose loss or gradient is not finite, all skipped, that stop the run.
      spikes: go back to the last good checkpoint when the loss jumps; None lets it jump.
      profile: "10:15" traces steps 11 to 15, rounded out to whole calls, into profile/ of the run's folder.
      initialize: a run's folder (RUN:STEP: of that step) or an export whose parameters the run begins with.
      initialize_mismatch: "vocabulary" keeps the rows of token ids that both have; "any" takes what fits.
      compile_cache: folder that keeps compiled programs for the next start; "off"; None: one in the cache folder.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    carry_state: bool = False
    seed: int = chz.field(default=0, validator=requires(lambda n: 0 <= n < 2**31, f"must be between 0 and {2**31 - 1}"))
    directory: str | None = None
    steps_per_call: int = 50
    log_every: int = 50
    evaluate_every: int = 100
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int | None = chz.field(default=None, validator=at_least(1))
    on_disk_full: Literal["stop", "continue"] = "stop"
    stop_at_accuracy: float | None = None
    precision: Literal["highest", "default"] = "highest"
    mesh: Mesh = Mesh()
    sample_every: int = chz.field(default=0, validator=at_least(0))
    tensorboard: bool = False
    wandb: Literal["online", "offline"] | None = None
    stop_after_nonfinite: int = 3
    spikes: Spikes | None = None
    profile: str | None = None
    initialize: str | None = None
    initialize_mismatch: Literal["refuse", "vocabulary", "any"] = "refuse"
    compile_cache: str | None = None

    @chz.validate
    def _ranges(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "steps_per_call", "keep_checkpoints", "stop_after_nonfinite")
        for name in (*counts, "log_every", "evaluate_every", "checkpoint_every"):
            if not 1 <= getattr(self, name) < 2**31:
                raise UserError(f"run.{name}={getattr(self, name)}: must be at least 1 and at most {2**31 - 1}")
        if self.stop_at_accuracy is not None and not 0 <= self.stop_at_accuracy <= 1:
            raise UserError(f"run.stop_at_accuracy={self.stop_at_accuracy}: must be between 0 and 1, for example 0.95")
        if self.profile is not None:
            from recollect.training.monitoring.profiling import parse_window

            parse_window(self.profile)
        if self.batch_size % self.accumulate:
            raise UserError(f"run.accumulate={self.accumulate} does not divide run.batch_size={self.batch_size}")
        devices = self.mesh.data * self.mesh.fsdp
        if self.batch_size // self.accumulate % devices:
            raise UserError(f"run.batch_size={self.batch_size} cannot be split over {devices} devices")


@chz.chz(typecheck=True)
class Experiment(Config):
    """One run's whole configuration: `name` is its label in tables and its folder in runs/, `task` its column there."""

    name: str
    task: str = ""
    model: LanguageModel
    data: DataConfig
    optimizer: Optimizer = AdamW()
    loss: Loss = Loss()
    run: Run = Run()

    @chz.validate
    def _fits(self) -> None:
        for field, text in (("name", self.name), ("task", self.task or "any")):
            if text in ("", ".", "..") or text[0] == "-" or "/" in text or not text.isprintable():
                raise UserError(f"{field}={text!r}: must be usable as the name of a folder, without / or a leading -")
        if not (self.run.directory or "").isprintable():
            raise UserError(f"run.directory={self.run.directory!r}: must be printable")
        limit, longest, parts = self.model.maximum_length(), self.data.longest, self.run.mesh.sequence
        if limit is not None and longest > limit:
            raise UserError(f"the data has sequences of {longest} tokens, this model takes at most {limit}")
        if longest % parts:
            nearest = f"the nearest length that it divides is {max(1, round(longest / parts)) * parts}"
            raise UserError(f"run.mesh.sequence={parts} does not divide the data's {longest} tokens; {nearest}")
        if self.run.spikes is not None and self.data.made_on_device:
            raise UserError("run.spikes needs data that can be skipped: a recall task's batches are drawn anew")


AROUND_STEPS = (
    *("directory", "log_every", "keep_checkpoints", "keep_every", "on_disk_full", "checkpoint_every"),
    *("sample_every", "tensorboard", "wandb", "profile", "compile_cache"),
)
"""Fields of `Run` that the compiled steps do not depend on."""


def program_of(experiment: Experiment) -> Experiment:
    """Returns `experiment` with its values-only fields at fixed numbers: equal for all that compile to one program."""
    optimizer = chz.replace(experiment.optimizer, **type(experiment.optimizer)().values())
    plain = {name: getattr(Run(), name) for name in ("seed", "spikes", "initialize", *AROUND_STEPS)}
    return chz.replace(experiment, name="any", task="", optimizer=optimizer, run=chz.replace(experiment.run, **plain))
