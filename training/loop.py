"""Training runs from config to result.json. The same call resumes a run that was cut off, and skips one that is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from configuration import UserError
from models.functional import count
from training import resume
from training.agreement import from_main
from training.distributed import is_main
from training.experiment import Experiment
from training.feeds import make_feed
from training.joint_start import check_start, prepare_data
from training.member import Member, run_directory
from training.metrics import Reporter
from training.operations import abstract_batch, operations_by_mixer
from training.program import evaluated, member_values, program_for
from training.signals import GO_ON, TERMINATED, StopRequests
from training.storage import DiskFull

__all__ = ["run_directory", "train", "train_members"]

Print = Callable[[str], None]


def train(experiment: Experiment, say: Print = print) -> dict[str, Any]:
    """Trains one experiment in its folder and returns what result.json holds. Its "status":

    "finished"; "stopped early" (`run.stop_at_accuracy`); "diverged"; "preempted" (SIGTERM: saved, and the same call goes on).

    Raises:
      UserError: the folder holds another config, all checkpoints are damaged, the devices asked for are not here, or the disk is full.
      KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
    """
    return train_members([experiment], together=False, say=say)[0]


def train_members(experiments: list[Experiment], *, together: bool, say: Print = print) -> list[dict[str, Any]]:
    """Trains members of a sweep: at once in one program (`together`; they may differ in values only), or in turn.

    Finished members are not trained again. Members trained together that finish early are frozen: their parameters stay what
    they were, while the others go on. After SIGTERM the results end with the preempted one.
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
            # What can be wrong with the model, the devices or the data is found before a folder is made.
            program_for(experiments[0], population)
            prepare_data(experiments[0].data)
        self.members = [Member(experiment, population is not None) for experiment in experiments]
        self.first = experiments[0]
        self.population = population
        self.stops = StopRequests()
        self._held_back = False

    def run(self) -> list[dict[str, Any]]:
        steps = self.first.run.steps
        results = [member.result for member in self.members]
        finished = all(result is not None and (result["steps"] >= steps or result["status"] != "finished") for result in results)
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
        run = self.first.run
        values = member_values([member.experiment for member in self.members], self.population is not None)
        state, step = resume.start(self.members, self.program, self.say)
        feed = make_feed(self.first, self.program, self.members[0].data_state)
        parameters = count(state["params"]) // (self.population or 1)
        reporter = Reporter([member.folder for member in self.members], self.first, self.say)
        operations = operations_by_mixer(self.first.model, abstract_batch(self.first))
        reporter.banner(parameters, jax.devices()[0], self.population, operations)
        if "corpus" in feed.facts():
            corpus = feed.facts()["corpus"]
            self.say(f"  corpus {corpus['source']}: {corpus['train']['bytes']:,} bytes to train on, sha256 {corpus['digest'][:16]}")
        request, timed = GO_ON, 0
        while step < run.steps and not all(member.done for member in self.members):
            request = self.stops.decision(step, step, str(self.members[0].folder.path))
            if request != GO_ON:
                break
            begun = time.perf_counter()
            # Calls end at the same steps whether or not the run was cut off.
            length = feed.steps_ahead(step, min(run.steps_per_call - step % run.steps_per_call, run.steps - step))
            frozen = np.array([member.done is not None for member in self.members])
            keep = jax.tree.map(lambda leaf: leaf.copy(), state) if frozen.any() else None
            state, metrics = feed.train(state, values, length, step)
            if keep is not None:
                state = _select(frozen, keep, state)
            host = jax.device_get(metrics)
            elapsed = time.perf_counter() - begun
            step += length
            self._count(step, elapsed, feed)
            reporter.steps(step, host, self._active(), [member.seconds for member in self.members])
            diverged = self._diverged(host)
            done_before = sum(member.done is not None for member in self.members)
            if _crossed(step, length, run.evaluate_every) or step >= run.steps or diverged.any():
                self._evaluate(state, step, feed, reporter, diverged)
            newly_done = sum(member.done is not None for member in self.members) > done_before
            if _crossed(step, length, run.checkpoint_every) or step >= run.steps or newly_done:
                self._save(state, last=step >= run.steps)
            if run.sample_every and _crossed(step, length, run.sample_every):
                reporter.sample(feed.sample(evaluated(state), step))
            self._check_storage()
            if length == timed:  # an earlier call had this length, so this one's time holds no compilation
                self.stops.seconds_left = elapsed + max(member.checkpoints.seconds for member in self.members)
            timed = length
        if request != GO_ON:
            self._save(state, last=True)
        with self._storage(ends=True):
            for member in self.members:
                member.checkpoints.wait()
        if request != GO_ON and request != TERMINATED:
            reporter.close()
            raise KeyboardInterrupt
        results = self._finish(parameters, feed, request == TERMINATED)
        reporter.close()
        return results

    def _active(self) -> list[bool]:
        return [member.done is None for member in self.members]

    def _count(self, step: int, elapsed: float, feed: Any) -> None:
        active = [member for member in self.members if member.done is None]
        for member in active:
            member.steps = step
            member.seconds += elapsed / len(active)
            member.data_state = feed.state()

    def _diverged(self, metrics: dict[str, np.ndarray]) -> np.ndarray:
        finite = np.isfinite(np.asarray(metrics["loss"])).all(axis=-1)
        return ~np.atleast_1d(finite)

    def _evaluate(self, state: Any, step: int, feed: Any, reporter: Reporter, diverged: np.ndarray) -> None:
        begun = time.perf_counter()
        last = step >= self.first.run.steps
        found = feed.evaluate(evaluated(state), [member.experiment.run.seed for member in self.members], final=last)
        seconds = time.perf_counter() - begun
        for index, member in enumerate(self.members):
            if member.done is not None:
                continue
            member.evaluation = found[index]
            member.seconds += seconds / len(self.members)
            reporter.evaluation(index, step, found[index], member.seconds)
            goal = self.first.run.stop_at_accuracy
            if diverged[index]:
                member.done = "diverged"
            elif goal is not None and found[index].get("accuracy", -1.0) >= goal:
                member.done = "stopped early"

    def _save(self, state: Any, *, last: bool) -> None:
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

    def _finish(self, parameters: int, feed: Any, preempted: bool) -> list[dict[str, Any]]:
        results = []
        for member in self.members:
            old = member.result
            if old is not None and old["steps"] == member.steps and old["status"] == member.done:
                results.append(old)
                continue
            member.folder.flush(to_disk=True)
            result = member.summary(member.done or ("preempted" if preempted else "finished"), parameters, feed)
            member.folder.write_result(result)
            results.append(result)
        if preempted and self.stops.since is not None:
            waited = time.monotonic() - self.stops.since
            self.say(f"preempted at step {max(member.steps for member in self.members):,}, saved {waited:.1f} s after SIGTERM")
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


def _select(frozen: np.ndarray, old: Any, new: Any) -> Any:
    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.numpy.where(frozen.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, old, new)
