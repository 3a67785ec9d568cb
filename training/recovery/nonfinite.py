"""Steps that are not finite, and losses that spike: counted, kept for replay, or rolled back from.

The step itself skips what is not finite (training/step.py). Here the skipped steps are counted, and the step that was
one too many in a row is kept, so that `python main.py replay DIR` can run it again. A spike of the loss
(loss_spikes.py) sends the run back to its last good checkpoint, past the data in between.
"""

from __future__ import annotations

import shlex
from typing import Any

from recollect.models.functional import Params
from recollect.starting import PROGRAM
from recollect.training.batches import Call
from recollect.training.recovery.replay import save_failure
from recollect.training.run_state import RunProgress, RunState


def observe(run: RunState, call: Call) -> None:
    """Goes through a call's steps: counts those skipped, and rolls the run back at a loss spike.

    `failed_at` becomes the step that was one too many in a row that could not be taken; later ones changed nothing.
    """
    progress = run.progress
    for offset in range(call.length):
        step = call.end - call.length + offset + 1
        if call.metrics["skipped"][offset]:
            progress.skipped += 1
            progress.in_row += 1
            run.log(
                f"  step {step:,} skipped: its loss or gradient is not finite "
                f"({progress.in_row} in a row, {progress.skipped} in all)"
            )
            if progress.in_row == run.experiment.run.stop_after_nonfinite:
                progress.failed_at = step
                return
        else:
            progress.in_row = 0
            if run.spikes is not None and run.spikes.observe(step, float(call.metrics["loss"][offset])):
                roll_back(run, step)
                return


def keep_failure(run: RunState, params: Params) -> None:
    """Writes the step that failed into the run's folder failures/STEP, and logs which layer broke first.

    Args:
      params: those that the step was taken from; no later step changed them.
    """
    progress, experiment = run.progress, run.experiment
    assert progress.failed_at is not None
    before = progress.failed_at - 1
    batch = run.batches.batch(before, experiment.run.seed)
    folder = run.folder.path / "failures" / str(progress.failed_at)
    sentence = save_failure(folder, experiment, params, batch, before).sentence()
    progress.failure = {"step": progress.failed_at, "found": sentence, "folder": str(folder)}
    run.log(
        f"  stopped: {experiment.run.stop_after_nonfinite} steps in a row, "
        f"up to step {progress.failed_at:,}, are not finite: {sentence}"
    )
    run.log(f"  to take that step again: {PROGRAM} replay {shlex.quote(str(folder))}")


def roll_back(run: RunState, spike: int) -> None:
    """Goes back to the newest good checkpoint before the step of a spike, or to the beginning, and leaves out the
    batches since."""
    detector = run.spikes
    assert detector is not None
    seconds, kept = run.progress.seconds, detector.state()
    run.log(f"  step {spike:,}: the loss jumped above {detector.limit():.4g} (rollback {detector.rollbacks})")
    run.state, run.progress = None, RunProgress()  # what is loaded takes the state's place on the devices
    run.checkpoints.wait()
    run.start(lambda: run.program.init(run.experiment.run.seed), before=spike)
    run.progress.seconds = seconds
    detector.set_state(kept)
    step = run.progress.step
    batches: Any = run.batches  # the host's: a config with `run.spikes` has no others
    batches.skip(spike - step)
    run.log(f"  {spike - step:,} batches after step {step:,} are left out")
    run.pipeline.restart(step)
