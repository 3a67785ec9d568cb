"""The state of one run: its folder and checkpoints, how far it is, and what happened in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz
import jax

from recollect.configuration.machine import environment, expanded
from recollect.models.functional import state_bytes_at
from recollect.training.checkpoint.orbax_folder import Checkpoints
from recollect.training.distributed.host import current_host
from recollect.training.experiment import Experiment
from recollect.training.recovery.loss_spikes import LossSpikeDetector
from recollect.training.run_folder import RunFolder, read_result

if TYPE_CHECKING:
    from recollect.training.batches import DeviceBatches, StepPipeline
    from recollect.training.host_batches import HostBatches
    from recollect.training.monitoring.run_log import Meter
    from recollect.training.step import Program

Log = Callable[[str], None]


def run_directory(experiment: Experiment) -> Path:
    """Returns the run's folder: `run.directory`, or runs/NAME."""
    return expanded(experiment.run.directory or f"runs/{experiment.name}", f"run.directory={experiment.run.directory}")


@dataclasses.dataclass
class RunProgress:
    """How far a run is; every checkpoint holds it.

    Attributes:
      step, seconds: steps done, and time spent in them and in evaluation.
      done: "finished", "stopped early" or "diverged" once the run no longer trains.
      evaluation: metrics of the last evaluation.
      data_state: where the data stand (see `DeviceBatches.state`).
      skipped, in_row: steps skipped because they were not finite: in total, and in a row up to now.
      failed_at: the last of `run.stop_after_nonfinite` such steps in a row.
      failure: entry of result.json about it.
      facts: entries of result.json about where it began and what changed: "initialized_from", "extended".
    """

    step: int = 0
    seconds: float = 0.0
    done: str | None = None
    evaluation: dict[str, Any] | None = None
    data_state: Any = None
    skipped: int = 0
    in_row: int = 0
    failed_at: int | None = None
    failure: dict[str, Any] | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class RunState:
    """One run, which hooks read and change.

    Attributes:
      result: what result.json held at the start; None: there was none.
      progress: how far it is.
      spikes: the detector of loss spikes; None where `run.spikes` is.
      state: the train state after the last call sent (see `step.State`); its arrays may still be computed.
      shapes: of the state (see `shapes_of`), once it has begun.
      program, batches, pipeline, meter: what trains it and measures its rates.
      stop_signal: "SIGTERM" or "SIGINT" once it was asked to stop.
    """

    program: Program
    batches: DeviceBatches | HostBatches
    pipeline: StepPipeline
    meter: Meter

    def __init__(self, experiment: Experiment, log: Log, keep_checkpoints: int | None = None):
        self.experiment = experiment
        self.log = log
        run = experiment.run
        self.folder = RunFolder(run_directory(experiment), experiment)
        keep = keep_checkpoints or run.keep_checkpoints
        self.checkpoints = Checkpoints(self.folder.checkpoints, keep, run.keep_every)
        self.result = read_result(self.folder.path)
        self.progress = RunProgress()
        self.spikes = None if run.spikes is None else LossSpikeDetector(run.spikes)
        self.state: Any = None
        self.shapes: Any = None
        self.stop_signal: str | None = None

    def start(self, fresh: Callable[[], Any], before: int | None = None) -> None:
        """Goes on from the newest good checkpoint (of a step less than `before`), or from `fresh()` at step 0. Arrays
        are loaded onto the devices that hold a fresh state, whatever mesh saved them.

        Raises:
          UserError: all checkpoints are damaged, or hold a state of another structure.
        """
        self.folder.write_environment()
        step = None
        begun = (self.folder.path / "metrics.jsonl").exists() or self.checkpoints.directory.is_dir()
        if current_host().broadcast(begun):
            from recollect.training.checkpoint.resume import delete_unfinished, newest_good, rewind

            delete_unfinished(self.checkpoints, self.log)
            step = newest_good(self.checkpoints, self.log, before)
            if step is None:
                rewind(self, 0)
        state = fresh()
        self.shapes = shapes_of(state)
        if step is None:
            if self.experiment.run.initialize is not None:
                from recollect.training.checkpoint.initialize import initialized

                state = initialized(self, state)
            self.state = state
        else:
            del state  # what is loaded takes its place on the devices
            from recollect.training.checkpoint.resume import resume

            self.state = resume(self, step, self.shapes)

    def extra(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the arrays, JSON-ready."""
        return {
            **dataclasses.asdict(self.progress),
            "guard": None if self.spikes is None else self.spikes.state(),
            "mesh": chz.asdict(self.experiment.run.mesh),
            "environment": environment(),
        }

    def summary(self, status: str, parameters: int) -> dict[str, Any]:
        """Returns the entries of result.json."""
        experiment, progress, data = self.experiment, self.progress, self.experiment.data
        rates = self.meter.total()
        return {
            "name": experiment.name,
            **(progress.evaluation or {}),
            "status": status,
            "steps": progress.step,
            "skipped_steps": progress.skipped,
            **({} if self.spikes is None else {"rollbacks": self.spikes.rollbacks}),
            **({} if progress.failure is None else {"failure": progress.failure}),
            **progress.facts,
            "seconds": round(progress.seconds, 3),
            **({} if rates is None else {"examples_per_second": rates.tokens_per_second / data.tokens_per_example}),
            **({} if rates is None else rates.facts()),
            "parameters": parameters,
            "state_bytes": state_bytes_at(experiment.model, data.vocabulary, data.lengths),
            "learning_rate": experiment.optimizer.learning_rate,
            "seed": experiment.run.seed,
            **self.batches.result_entries(),
        }


def shapes_of(state: Any) -> Any:
    """Returns shapes, dtypes and shardings of a state: what a checkpoint is loaded into."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
