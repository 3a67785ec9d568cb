"""What goes wrong inside a run: steps that are not finite, and a loss that jumps.

The step itself skips what is not finite (training/step.py); here the skipped ones are counted, and the run's end after
too many in a row is written down so that `python main.py replay DIR` can take the step again. A jump of the loss
(training/recovery/loss_spikes.py) sends the run back to its last good checkpoint, past the data in between.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recollect.configuration import UserError
from recollect.training.checkpoint import resume
from recollect.training.experiment import Experiment
from recollect.training.recovery.replay import diagnose_step, save_failure
from recollect.training.run_state import Member
from recollect.training.step import Program
from recollect.training.step_pipeline import Call, Calls

Say = Callable[[str], None]


def check(experiment: Experiment) -> None:
    """Raises UserError where `run.spikes` asks for what the data cannot do."""
    if experiment.run.spikes is not None and hasattr(experiment.data, "train_batch"):
        raise UserError(
            "run.spikes needs data that can be skipped: a recall task's batches are drawn anew at each step"
        )


def observe(member: Member, index: int, call: Call, say: Say) -> int | None:
    """Takes in one member's metrics of a call, step by step.

    `member.failed_at` becomes the step that was one too many in a row that could not be taken; what comes after it
    changed nothing.

    Returns:
      the step of a spike that the run must go back from, or None.
    """
    rows = {name: np.asarray(call.metrics[name]).reshape(-1, call.length)[index] for name in ("loss", "skipped")}
    limit = member.experiment.run.stop_after_nonfinite
    for offset in range(call.length):
        step = call.end - call.length + offset + 1
        if rows["skipped"][offset]:
            member.skipped += 1
            member.in_row += 1
            say(
                f"  step {step:,} skipped: its loss or gradient is not finite ({member.in_row} in a row, {member.skipped} in all)"
            )
            if member.in_row == limit:
                member.failed_at = step
                return None
        else:
            member.in_row = 0
            if member.guard.observe(step, float(rows["loss"][offset])):
                return step
    return None


def keep_failure(member: Member, index: int, program: Program, feed: Any, state: Any, say: Say) -> None:
    """Writes the step that failed into the run's folder failures/STEP, and says which layer broke first.

    The parameters of `state` are those that the step was taken from: no later one changed them.
    """
    assert member.failed_at is not None
    before = member.failed_at - 1
    own = state["params"] if program.population is None else jax.tree.map(lambda leaf: leaf[index], state["params"])
    experiment = member.experiment
    batch = feed.batch(before, experiment.run.seed)
    found = diagnose_step(program, own, batch, before)
    folder: Path = member.folder.path / "failures" / str(member.failed_at)
    save_failure(folder, experiment, own, batch, before, found)
    member.failure = {"step": member.failed_at, "found": found.sentence(), "folder": str(folder)}
    say(
        f"  stopped: {experiment.run.stop_after_nonfinite} steps in a row, up to step {member.failed_at:,}, are not finite: {found.sentence()}"
    )
    say(f"  to take that step again: python main.py replay {folder}")


def roll_back(member: Member, spike: int, calls: Calls, program: Program, wanted: Any, say: Say) -> None:
    """Goes back to the newest good checkpoint before the step of a spike, or to the beginning, and leaves out the
    batches since."""
    seconds, rollbacks = member.seconds, member.guard.rollbacks
    say(f"  step {spike:,}: the loss jumped above {member.guard.limit():.4g} (rollback {rollbacks})")
    calls.state = None  # what is loaded takes its place on the devices
    member.checkpoints.wait()
    step = member.checkpoints.newest_good(say, before=spike)
    guard = member.guard.state()
    if step is None:
        state, step = program.init(member.experiment.run.seed), 0
        member.reset()
        member.folder.truncate_metrics(0)
    else:
        state = resume.load(member, step, wanted, say)
    member.seconds = seconds
    member.guard.set_state(guard)
    calls.feed.skip(spike - step)
    say(f"  {spike - step:,} batches after step {step:,} are left out")
    calls.restart(state, step)
