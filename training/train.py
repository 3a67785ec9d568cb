"""Training of one run, from config to result.json.

The same call resumes a run that was interrupted, and skips one that is done. What happens around the steps (logging,
evaluation, checkpoints, ...) are hooks: see `recollect.training.hooks`. Many runs in one program are
`recollect.training.sweeps.population`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recollect.configuration.machine import keep_compiled_programs
from recollect.models.functional import count
from recollect.training.batches import StepPipeline, open_batches
from recollect.training.distributed.host import current_host
from recollect.training.experiment import Experiment
from recollect.training.hooks import Hook, make_hooks
from recollect.training.recovery.run_lock import locked
from recollect.training.run_folder import is_done
from recollect.training.run_state import RunState, run_directory
from recollect.training.step import member_values, program_for


def train(experiment: Experiment, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains one experiment in its folder and returns what result.json holds: its "status" is "finished", "stopped
    early" (`run.stop_at_accuracy`), "diverged", or "preempted" (SIGTERM: saved, and the same call goes on).

    Raises:
      UserError: the folder holds another config, all checkpoints are damaged, the devices asked for are not here, the
        disk is full, or another process trains in the folder.
      KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
    """
    host = current_host()
    prepare([experiment])
    with locked(run_directory(experiment)):
        run = RunState(experiment, log if host.is_main else lambda text: None)
        result = host.broadcast(run.result if is_done(run.result, experiment.run.steps) else None)
        if result is not None:
            asked = f"with {result['steps']:,} steps, run.steps={experiment.run.steps:,}"
            run.log(f"{run.folder.path}: already finished ({asked}), not trained again")
            return result
        run.folder.unfinish()
        run.program = program_for(experiment)
        hooks = make_hooks(run)
        try:
            run.start(lambda: run.program.init(experiment.run.seed))
            run.batches = open_batches(experiment, run.program, run.progress.data_state)
            run.pipeline = StepPipeline(run, member_values([experiment], False), run.progress.step)
            train_steps(run, hooks)
            return finish(run, count(run.state["params"]))
        finally:
            for hook in reversed(hooks):
                hook.close(run)


def prepare(experiments: list[Experiment]) -> None:
    """Finds what is wrong with the model, the devices or the data before a folder is made, unless all runs are done."""
    host, first = current_host(), experiments[0]
    if host.count > 1:
        from recollect.training.distributed.consistency import check_start

        check_start(experiments)
    if all((run_directory(experiment) / "result.json").exists() for experiment in experiments):
        return
    keep_compiled_programs(first.run.compile_cache)
    program = program_for(first, len(experiments) if len(experiments) > 1 else None)
    if any(experiment.run.initialize for experiment in experiments):
        from recollect.training.checkpoint.initialize import check_sources

        check_sources(experiments)
    if host.count > 1:
        from recollect.training.distributed.consistency import prepare_data

        prepare_data(first.data)
        return
    tokens = first.run.batch_size // first.run.accumulate * first.data.longest
    largest = max(count(program.model.abstract_params()), tokens * program.model.config.width)
    if largest * len(experiments) > 2**26:  # fewer numbers fit every machine
        from recollect.models.memory import check_size

        check_size(program.model, tokens, len(experiments))
    if not first.data.made_on_device:
        first.data.prepare()


def train_steps(run: RunState, hooks: list[Hook]) -> None:
    """Trains `run` to its last step, or to where a hook ends it; one call of steps is always in flight."""
    pipeline = run.pipeline
    for hook in hooks:
        hook.begin(run)
    while pipeline.sent < run.experiment.run.steps and run.progress.done is None:
        length = pipeline.next_length()
        for hook in hooks:
            hook.before_call(run, length)
        if run.stop_signal is not None:
            break
        call = pipeline.send(length)
        _fetch(run, hooks, in_flight=1)
        if any(hook.due(run, call) for hook in hooks):
            _fetch(run, hooks, in_flight=0)
            if pipeline.sent == call.end:  # else a hook went back to an earlier step
                for hook in hooks:
                    if hook.due(run, call):
                        hook.act(run, call)
            pipeline.pause()
    _fetch(run, hooks, in_flight=0)
    for hook in reversed(hooks):
        hook.end(run)
    if run.stop_signal == "SIGINT":
        saved = f"{run.folder.path} is saved at step {run.progress.step:,}"
        raise KeyboardInterrupt(f"{saved}, and the same command goes on")


def _fetch(run: RunState, hooks: list[Hook], *, in_flight: int) -> None:
    """Waits until no more than `in_flight` calls are, and hands each one's metrics to the hooks."""
    while run.pipeline.ahead > in_flight:
        call = run.pipeline.fetch()
        if run.progress.failed_at is None:  # no later step changed anything
            run.progress.step = call.end
            run.progress.seconds += call.seconds
            run.progress.data_state = call.data_state
            for hook in hooks:
                hook.after_call(run, call)


def finish(run: RunState, parameters: int) -> dict[str, Any]:
    """Writes result.json and returns what it holds."""
    result = run.summary(run.progress.done or ("preempted" if run.stop_signal else "finished"), parameters)
    run.folder.flush(to_disk=True)
    run.folder.write("result.json", result)
    return result
