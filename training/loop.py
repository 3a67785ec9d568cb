"""Training runs from config to result.json. The same call resumes a run that was cut off, and skips one that is done."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.accounting import state_bytes_at
from models.functional import count
from training.checkpoints import Checkpoints
from training.experiment import Experiment
from training.feeds import make_feed
from training.metrics import Reporter
from training.operations import abstract_batch, operations_by_mixer
from training.program import member_values, program_for
from training.run_folder import RunFolder, environment, same_bits_possible

Print = Callable[[str], None]


def run_directory(experiment: Experiment) -> Path:
    """The run's folder: `run.directory`, or runs/NAME."""
    return Path(experiment.run.directory or f"runs/{experiment.name}")


def train(experiment: Experiment, say: Print = print) -> dict[str, Any]:
    """Trains one experiment in its folder and returns what result.json holds.

    Raises:
      UserError: the folder holds another config, a checkpoint is damaged, or the devices asked for are not here.
    """
    return train_members([experiment], together=False, say=say)[0]


def train_members(experiments: list[Experiment], *, together: bool, say: Print = print) -> list[dict[str, Any]]:
    """Trains members of a sweep: at once in one program (`together`; they may differ in values only), or in turn.

    Finished members are not trained again. Members trained together that finish early are frozen: their parameters stay what
    they were, while the others go on.
    """
    if not together:
        return [_Session([experiment], None, say).run()[0] for experiment in experiments]
    return _Session(experiments, len(experiments), say).run()


class _Member:
    """One run: its folder, what happened in it, and whether it still trains."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.folder = RunFolder(run_directory(experiment), experiment)
        self.checkpoints = Checkpoints(self.folder.checkpoints, experiment.run.keep_checkpoints)
        self.done: str | None = None
        self.seconds = 0.0
        self.steps = 0
        self.evaluation: dict[str, Any] | None = None
        self.data_state: Any = None

    def extra(self) -> dict[str, Any]:
        return {
            "step": self.steps,
            "seconds": self.seconds,
            "done": self.done,
            "evaluation": self.evaluation,
            "data_state": self.data_state,
            "environment": environment(),
        }


class _Session:
    def __init__(self, experiments: list[Experiment], population: int | None, say: Print):
        self.say = say
        if not all((run_directory(experiment) / "result.json").exists() for experiment in experiments):
            # What can be wrong with the model, the devices or the data is found before a folder is made.
            program_for(experiments[0], population)
            experiments[0].data.prepare()
        self.members = [_Member(experiment) for experiment in experiments]
        self.first = experiments[0]
        self.population = population
        self._stop_requested = False

    def run(self) -> list[dict[str, Any]]:
        results = [member.folder.result() for member in self.members]
        steps = self.first.run.steps
        if all(result is not None and (result["steps"] >= steps or result["status"] != "finished") for result in results):
            for member in self.members:
                self.say(f"{member.folder.path}: already finished, not trained again")
                member.checkpoints.close()
            return [result for result in results if result is not None]
        for member in self.members:
            if member.folder.result() is not None and self.population is None:
                member.folder.unfinish()
        self.program = program_for(self.first, self.population)
        try:
            with _on_termination(self._request_stop):
                return self._train()
        finally:
            for member in self.members:
                member.checkpoints.close()

    def _request_stop(self) -> None:
        self._stop_requested = True

    def _train(self) -> list[dict[str, Any]]:
        run = self.first.run
        values = member_values([member.experiment for member in self.members], self.population is not None)
        state, step = self._start()
        feed = make_feed(self.first, self.program, self.members[0].data_state)
        parameters = count(state["params"]) // (self.population or 1)
        reporter = Reporter([member.folder for member in self.members], self.first, self.say)
        operations = operations_by_mixer(self.first.model, abstract_batch(self.first))
        reporter.banner(parameters, jax.devices()[0], self.population, operations)
        if "corpus" in feed.facts():
            corpus = feed.facts()["corpus"]
            self.say(f"  corpus {corpus['source']}: {corpus['train']['bytes']:,} bytes to train on, sha256 {corpus['digest'][:16]}")
        longest_call = min(run.steps_per_call, run.steps)
        while step < run.steps and not all(member.done for member in self.members):
            begun = time.perf_counter()
            length = feed.steps_ahead(step, min(longest_call, run.steps - step))
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
            if self._stop_requested or _crossed(step, length, run.checkpoint_every) or step >= run.steps or newly_done:
                self._save(state)
            if run.sample_every and _crossed(step, length, run.sample_every):
                reporter.sample(feed.sample(state["params"], step))
            if self._stop_requested:
                raise KeyboardInterrupt
        return self._finish(state, parameters, feed, reporter)

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
        found = feed.evaluate(state["params"], [member.experiment.run.seed for member in self.members], final=last)
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

    def _start(self) -> tuple[Any, int]:
        """Fresh state, or the newest one that all members still have."""
        seeds = [member.experiment.run.seed for member in self.members]
        fresh = self.program.init(seeds[0] if self.population is None else seeds)
        for member in self.members:
            member.folder.write_environment()
        common: set[int] = set.intersection(*(self._resumable(member) for member in self.members))
        if not common:
            for member in self.members:
                member.folder.truncate_metrics(0)
                member.checkpoints.clear()
            return fresh, 0
        rows = []
        step = 0
        for index, member in enumerate(self.members):
            own = self._resume_step(member, max(common))
            one = fresh if self.population is None else jax.tree.map(lambda leaf, index=index: leaf[index], fresh)
            state, extra = member.checkpoints.load(own, one)
            member.steps, member.seconds, member.evaluation = extra["step"], extra["seconds"], extra["evaluation"]
            member.done, member.data_state = extra["done"], extra["data_state"]
            if member.done == "finished" and member.steps < self.first.run.steps:
                member.done = None
            member.folder.truncate_metrics(own)
            step = max(step, own if member.done is None else 0)
            rows.append(state)
            self._note_resume(member, own, extra)
        stacked = rows[0] if self.population is None else jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), stacked, fresh)
        return placed, step

    def _resumable(self, member: _Member) -> set[int]:
        """Steps a member can go on from. One that ended early can stand beside the others at any step."""
        steps = set(member.checkpoints.steps())
        result = member.folder.result()
        if self.population is not None and result is not None and steps:
            return set().union(*(other.checkpoints.steps() for other in self.members))
        return steps

    def _resume_step(self, member: _Member, common: int) -> int:
        steps = member.checkpoints.steps()
        return common if common in steps else max(steps)

    def _note_resume(self, member: _Member, step: int, extra: dict[str, Any]) -> None:
        changed = same_bits_possible(extra["environment"], environment())
        note = f"; not promised to be bit-exact: {', '.join(changed)} changed" if changed else ""
        self.say(f"{member.folder.path}: resumed at step {step}{note}")

    def _save(self, state: Any) -> None:
        for index, member in enumerate(self.members):
            own = state if self.population is None else jax.tree.map(lambda leaf, index=index: leaf[index], state)
            if member.done is None and member.steps >= self.first.run.steps:
                member.done = "finished"
            member.checkpoints.save(member.steps, own, member.experiment, member.extra())

    def _finish(self, state: Any, parameters: int, feed: Any, reporter: Reporter) -> list[dict[str, Any]]:
        results = []
        for member in self.members:
            old = member.folder.result()
            if old is not None and old["steps"] == member.steps and old["status"] == member.done:
                results.append(old)
                continue
            experiment = member.experiment
            examples = member.steps * experiment.run.batch_size
            result = {
                "name": experiment.name,
                **(member.evaluation or {}),
                "status": member.done or "finished",
                "steps": member.steps,
                "seconds": round(member.seconds, 3),
                "examples_per_second": examples / max(member.seconds, 1e-9),
                "tokens_per_second": examples * feed.tokens_per_example() / max(member.seconds, 1e-9),
                "parameters": parameters,
                "state_bytes": state_bytes_at(experiment.model, experiment.data.vocabulary, feed.lengths()),
                "learning_rate": experiment.optimizer.learning_rate,
                "seed": experiment.run.seed,
                **feed.facts(),
            }
            member.folder.write_result(result)
            results.append(result)
        reporter.close()
        return results


def _crossed(step: int, length: int, every: int) -> bool:
    return step // every > (step - length) // every


def _select(frozen: np.ndarray, old: Any, new: Any) -> Any:
    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.numpy.where(frozen.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, old, new)


class _on_termination:
    """SIGTERM and Ctrl-C end the run at the next call, after a checkpoint; a second one ends it at once."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def __enter__(self) -> None:
        self.old: dict[int, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.old[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            self.old = {}

    def _handle(self, number: int, frame: Any) -> None:
        self.action()
        signal.signal(number, self.old[number])
        print("stopping after this call of steps; once more stops at once", file=sys.stderr)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
