"""One run of a session: its folder, what happened in it, and whether it still trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recollect.models.functional import state_bytes_at
from recollect.training.checkpoint.orbax_folder import Checkpoints
from recollect.training.experiment import Experiment
from recollect.training.recovery.loss_spikes import SpikeGuard
from recollect.training.run_folder import RunFolder, environment


def run_directory(experiment: Experiment) -> Path:
    """The run's folder: `run.directory`, or runs/NAME."""
    return Path(experiment.run.directory or f"runs/{experiment.name}")


class Member:
    """One run of a session. A lone run is a session's only member; the members of a population train in one program.

    Attributes:
      result: what result.json held when the session began, None for a run that has to go on (a preempted one too).
      done: "finished", "stopped early" or "diverged" once it no longer trains.
      steps, seconds, evaluation, data_state: where it stands.
      skipped, in_row: steps that could not be taken, in all and just now one after the other.
      failed_at, failure: the step that was one too many of them, and what result.json is to say of it.
      guard: sees spikes of the loss, and counts the rollbacks.
    """

    def __init__(self, experiment: Experiment, population: bool):
        self.experiment = experiment
        run = experiment.run
        self.folder = RunFolder(run_directory(experiment), experiment)
        # The members' checkpoints of one step are not renamed at one moment: with one each, a kill between could leave
        # none in common.
        keep = max(2, run.keep_checkpoints) if population else run.keep_checkpoints
        self.checkpoints = Checkpoints(self.folder.checkpoints, keep, run.keep_every)
        found = self.folder.result()
        self.result = None if found is None or found["status"] == "preempted" else found
        self.done: str | None = None
        self.seconds = 0.0
        self.guard = SpikeGuard(run.spikes)
        self.failed_at: int | None = None
        self.failure: dict[str, Any] | None = None
        self.reset()

    def reset(self) -> None:
        """Stands at step 0."""
        self.steps = self.skipped = self.in_row = 0
        self.evaluation: dict[str, Any] | None = None
        self.data_state: Any = None

    def extra(self) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays."""
        mesh = self.experiment.run.mesh
        return {
            "step": self.steps,
            "seconds": self.seconds,
            "done": self.done,
            "evaluation": self.evaluation,
            "data_state": self.data_state,
            "skipped": self.skipped,
            "in_row": self.in_row,
            "failed_at": self.failed_at,
            "failure": self.failure,
            "guard": self.guard.state(),
            "mesh": {name: getattr(mesh, name) for name in ("data", "fsdp", "tensor", "sequence")},
            "environment": environment(),
        }

    def restore(self, extra: dict[str, Any]) -> None:
        """Takes over what a checkpoint holds beside the arrays."""
        self.steps, self.seconds, self.evaluation = extra["step"], extra["seconds"], extra["evaluation"]
        self.done, self.data_state = extra["done"], extra["data_state"]
        self.skipped, self.in_row = extra["skipped"], extra["in_row"]
        self.failed_at, self.failure = extra["failed_at"], extra["failure"]
        self.guard.set_state(extra["guard"])
        if self.done == "finished" and self.steps < self.experiment.run.steps:
            self.done = None

    def summary(self, status: str, parameters: int, feed: Any) -> dict[str, Any]:
        """What result.json is to hold."""
        experiment = self.experiment
        examples = self.steps * experiment.run.batch_size
        return {
            "name": experiment.name,
            **(self.evaluation or {}),
            "status": status,
            "steps": self.steps,
            "skipped_steps": self.skipped,
            **({} if experiment.run.spikes is None else {"rollbacks": self.guard.rollbacks}),
            **({} if self.failure is None else {"failure": self.failure}),
            "seconds": round(self.seconds, 3),
            "examples_per_second": examples / max(self.seconds, 1e-9),
            "tokens_per_second": examples * feed.tokens_per_example() / max(self.seconds, 1e-9),
            "parameters": parameters,
            "state_bytes": state_bytes_at(experiment.model, experiment.data.vocabulary, feed.lengths()),
            "learning_rate": experiment.optimizer.learning_rate,
            "seed": experiment.run.seed,
            **feed.facts(),
        }
