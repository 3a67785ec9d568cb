"""Training runs from config to result.json. The same call resumes a run that was cut off, and skips one that is
done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from recollect.configuration import UserError
from recollect.models.functional import count
from recollect.training.batches import make_feed
from recollect.training.checkpoint import resume
from recollect.training.checkpoint.integrity import DiskFull
from recollect.training.distributed.collectives import from_main, whole
from recollect.training.distributed.consistency import check_start, prepare_data
from recollect.training.distributed.processes import is_main
from recollect.training.experiment import Experiment
from recollect.training.monitoring.backends_used import abstract_batch, operations_by_mixer
from recollect.training.monitoring.profiling import keep_compiled_programs
from recollect.training.monitoring.run_log import Reporter
from recollect.training.recovery import nonfinite
from recollect.training.recovery.preemption import GO_ON, TERMINATED, StopRequests
from recollect.training.run_folder import is_done
from recollect.training.run_state import Member, run_directory
from recollect.training.step import evaluated, member_values, program_for
from recollect.training.step_pipeline import Call, Calls

__all__ = ["run_directory", "train", "train_members"]

Print = Callable[[str], None]


def train(experiment: Experiment, say: Print = print) -> dict[str, Any]:
    """Trains one experiment in its folder and returns what result.json holds. Its "status":

    "finished"; "stopped early" (`run.stop_at_accuracy`); "diverged"; "preempted" (SIGTERM: saved, and the same call
    goes on).

    Raises:
      UserError: the folder holds another config, all checkpoints are damaged, the devices asked for are not here, or
        the disk is full.
      KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
    """
    return train_members([experiment], together=False, say=say)[0]


def train_members(experiments: list[Experiment], *, together: bool, say: Print = print) -> list[dict[str, Any]]:
    """Trains members of a sweep: at once in one program (`together`; they may differ in values only), or in turn.

    Finished members are not trained again. Members trained together that finish early are frozen: their parameters stay
    what they were, while the others go on. After SIGTERM the results end with the preempted one.
    """
    if together:
        return _Session(experiments, len(experiments), say).run()
    results: list[dict[str, Any]] = []
    for experiment in experiments:
        results += _Session([experiment], None, say).run()
        if results[-1]["status"] == "preempted":
            break
    return results


class _Session:
    def __init__(self, experiments: list[Experiment], population: int | None, say: Print):
        self.say = say if is_main() else lambda text: None
        check_start(experiments)
        if not all((run_directory(experiment) / "result.json").exists() for experiment in experiments):
            nonfinite.check(experiments[0])
            keep_compiled_programs(experiments[0].run.compile_cache)
            # What can be wrong with the model, the devices or the data is found before a folder is made.
            program_for(experiments[0], population)
            prepare_data(experiments[0].data)
        self.members = [Member(experiment, population is not None) for experiment in experiments]
        self.first = experiments[0]
        self.population = population
        self.stops = StopRequests()
        self._held_back = False

    def run(self) -> list[dict[str, Any]]:
        results = [member.result for member in self.members]
        finished = all(is_done(result, self.first.run.steps) for result in results)
        if from_main(int(finished)):
            for member in self.members:
                self.say(f"{member.folder.path}: already finished, not trained again")
            return [result for result in results if result is not None]
        for member in self.members:
            if member.result is None or self.population is None:
                member.folder.unfinish()
        self.program = program_for(self.first, self.population)
        try:
            with self.stops:
                trained = self._train()
        except BaseException:
            for member in self.members:
                _close_quietly(member)
            raise
        for member in self.members:
            member.checkpoints.close()
        return trained

    def _train(self) -> list[dict[str, Any]]:
        values = member_values([member.experiment for member in self.members], self.population is not None)
        state, step = resume.start(self.members, self.program, self.say)
        self.wanted = resume.shapes_of(state)
        self.feed = make_feed(self.first, self.program, self.members[0].data_state)
        self.parameters = count(state["params"]) // (self.population or 1)
        self.calls = Calls(self.first, self.feed, values, state, step, self.members[0].folder.path, self.say)
        del state
        self.reporter = Reporter([member.folder for member in self.members], self.first, self.say, self.calls.meter)
        operations = operations_by_mixer(self.first.model, abstract_batch(self.first))
        self.reporter.banner(self.parameters, jax.devices()[0], self.population, operations)
        if "corpus" in self.feed.facts():
            corpus = self.feed.facts()["corpus"]
            self.say(
                f"  corpus {corpus['source']}: {corpus['train']['bytes']:,} bytes to train on, sha256 {corpus['digest'][:16]}"
            )
        try:
            request = self._cycle()
            if request != GO_ON:
                self._save(last=True)
            with self._storage(ends=True):
                for member in self.members:
                    member.checkpoints.wait()
            if request not in (GO_ON, TERMINATED):
                raise KeyboardInterrupt
            return self._finish(request == TERMINATED)
        finally:
            self.calls.profile.close()
            self.reporter.close()

    def _cycle(self) -> int:
        """Trains to the end, or to a request to stop, which it returns."""
        run, calls = self.first.run, self.calls
        name = str(self.members[0].folder.path)
        while calls.sent < run.steps and any(self._active()):
            request = self.stops.decision(calls.settled, calls.sent, name)
            if request != GO_ON:
                while calls.ahead:
                    self._settle()
                return request
            call = calls.send(np.array([not active for active in self._active()]))
            if calls.ahead > 1 and self._settle():
                continue
            due = [
                _crossed(call.end, call.length, every)
                for every in (run.evaluate_every, run.checkpoint_every, run.sample_every)
                if every
            ]
            failed = any(member.failed_at is not None and member.done is None for member in self.members)
            if any(due) or call.end >= run.steps or failed:
                # What looks at the state needs all numbers up to it; the devices wait meanwhile.
                if self._settle():
                    continue
                self._look(call)
                calls.pause()
            self._check_storage()
            if calls.call_seconds is not None:
                save = max(member.checkpoints.seconds for member in self.members)
                self.stops.seconds_left = 2 * calls.call_seconds + save
        return GO_ON

    def _settle(self) -> bool:
        """Fetches the oldest call and takes it in. True: the run went back to a checkpoint."""
        call = self.calls.fetch()
        active = [member for member in self.members if member.done is None and member.failed_at is None]
        for member in active:
            member.steps = call.end
            member.seconds += call.seconds / len(active)
            member.data_state = call.data_state
        self.reporter.steps(
            call.end, call.metrics, [m in active for m in self.members], [member.seconds for member in self.members]
        )
        for index, member in enumerate(self.members):
            spike = nonfinite.observe(member, index, call, self.say) if member in active else None
            if spike is not None:
                nonfinite.roll_back(member, spike, self.calls, self.program, self.wanted, self.say)
                return True
        return False

    def _look(self, call: Call) -> None:
        """Evaluates, saves and samples where it is time to; all calls are settled."""
        run, step = self.first.run, call.end
        done_before = self._active()
        failed = [member.failed_at is not None and member.done is None for member in self.members]
        due = _crossed(step, call.length, run.evaluate_every) or step >= run.steps
        if due or any(failed):
            self._evaluate([active and (due or bad) for active, bad in zip(done_before, failed, strict=True)])
        for index, member in enumerate(self.members):
            if failed[index]:
                nonfinite.keep_failure(member, index, self.program, self.feed, self.calls.state, self.say)
        if _crossed(step, call.length, run.checkpoint_every) or step >= run.steps or self._active() != done_before:
            self._save(last=step >= run.steps)
        if run.sample_every and _crossed(step, call.length, run.sample_every):
            params = whole(evaluated(self.calls.state))
            if is_main():
                self.reporter.sample(self.feed.sample(params, step))

    def _active(self) -> list[bool]:
        return [member.done is None for member in self.members]

    def _evaluate(self, which: list[bool]) -> None:
        """Evaluates all members and writes down the result of `which`."""
        begun = time.perf_counter()
        last = self.calls.settled >= self.first.run.steps
        seeds = [member.experiment.run.seed for member in self.members]
        found = self.feed.evaluate(evaluated(self.calls.state), seeds, final=last)
        seconds = time.perf_counter() - begun
        for index, member in enumerate(self.members):
            if not which[index]:
                continue
            member.evaluation = found[index]
            member.seconds += seconds / len(self.members)
            self.reporter.evaluation(index, member.steps, found[index], member.seconds)
            goal = self.first.run.stop_at_accuracy
            if member.failed_at is not None:
                member.done = "diverged"
            elif goal is not None and found[index].get("accuracy", -1.0) >= goal:
                member.done = "stopped early"

    def _save(self, *, last: bool) -> None:
        """Starts to save all members. `last`: there is no later checkpoint that could take this one's place."""
        for member in self.members:
            if member.done is None and member.steps >= self.first.run.steps:
                member.done = "finished"
        for member in self.members:
            with self._storage(ends=False):
                member.checkpoints.wait()  # none is written before all members have the one before
        with self._storage(ends=last):
            for member in self.members:
                member.folder.flush(to_disk=True)  # a checkpoint promises that all lines before it are on the disk
            state = self.calls.state
            for index, member in enumerate(self.members):
                own = state if self.population is None else jax.tree.map(lambda leaf, index=index: leaf[index], state)
                member.checkpoints.save(member.steps, own, member.experiment, member.extra())

    def _check_storage(self) -> None:
        """Tells a full disk as soon as it shows, and again only after it had space in between."""
        with self._storage(ends=False):
            for member in self.members:
                if jax.process_count() == 1 and member.checkpoints.failed():
                    member.checkpoints.wait()
        if self._held_back and not any(member.folder.held_back for member in self.members):
            self._held_back = False
        if not self._held_back:
            with self._storage(ends=False):
                self._held_back = any(member.folder.held_back for member in self.members)
                for member in self.members:
                    member.folder.flush()

    def _storage(self, *, ends: bool) -> _FullDisk:
        return _FullDisk(self.say, ends or self.first.run.on_disk_full == "stop")

    def _finish(self, preempted: bool) -> list[dict[str, Any]]:
        results = []
        for member in self.members:
            old = member.result
            if old is not None and old["steps"] == member.steps and old["status"] == member.done:
                results.append(old)
                continue
            member.folder.flush(to_disk=True)
            result = member.summary(
                member.done or ("preempted" if preempted else "finished"), self.parameters, self.feed
            )
            rates = self.calls.meter.total()
            if rates is not None:
                result |= rates.facts()
            member.folder.write_result(result)
            results.append(result)
        if preempted and self.stops.since is not None:
            waited = time.monotonic() - self.stops.since
            self.say(
                f"preempted at step {max(member.steps for member in self.members):,}, saved {waited:.1f} s after SIGTERM"
            )
        return results


class _FullDisk:
    """What a full disk does to the run, by `run.on_disk_full`: ends it with one line, or is said in one line."""

    def __init__(self, say: Print, stop: bool):
        self.say = say
        self.stop = stop

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, DiskFull):
            return False
        if self.stop:
            raise UserError(f"{error}; with space freed the same command goes on from there") from error
        self.say(f"  {error}; going on, trying again at the next checkpoint")
        return True


def _close_quietly(member: Member) -> None:
    """Lets a checkpoint that is being written end, while another error is on its way out."""
    if jax.process_count() == 1:
        with contextlib.suppress(Exception):
            member.checkpoints.close()


def _crossed(step: int, length: int, every: int) -> bool:
    return step // every > (step - length) // every
