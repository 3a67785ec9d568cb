"""Trains a study over the machines of a Ray cluster: `python main.py compare STUDY --on ray[:ADDRESS]`.

A task trains one group of members (all that compile to one program where they train at once, on accelerators; one
member otherwise) with the same calls as without Ray, in the same folders, so the results are the same. What is lost
with a worker is what it did since its last checkpoint: the task is started again and its runs go on from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recollect.configuration import UserError, to_json
from recollect.configuration.io import first_line
from recollect.configuration.machine import PROJECT
from recollect.configuration.progress import Progress
from recollect.configuration.read_json import read_json
from recollect.training.experiment import Experiment
from recollect.training.run_folder import is_done
from recollect.training.sweeps.study import groups, members

RETRIES = 3
"""Times that a task is started again after its worker was lost or it ended with an error that is not the user's."""


@dataclasses.dataclass(frozen=True)
class Swept:
    """What became of a study: the folders of runs that are done, in the study's order, and one line for each that
    failed."""

    folders: list[Path]
    failures: list[str]


@dataclasses.dataclass
class _Task:
    members: list[Experiment]
    attempts: int = 0

    @property
    def name(self) -> str:
        first = Path(self.members[0].run.directory or "")
        more = f" and {len(self.members) - 1} more" if len(self.members) > 1 else ""
        return f"{first.parent.name}/{first.name}{more}"


def run_study_on_ray(
    experiments: list[Experiment],
    sweep: tuple[dict[str, Any], ...],
    folder: Path,
    *,
    address: str | None = None,
    together: bool | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    definitions: list[Path] | None = None,
    log: Callable[[str], None] = print,
) -> Swept:
    """Trains what is not finished, as tasks of a Ray cluster.

    Args:
      folder: of the study, on a file system that all workers share.
      address: of a running cluster ("auto", HOST:PORT or ray://HOST:PORT); None starts one on this machine and ends it
        afterwards.
      together: as in `run_study`; None: where the cluster has GPUs.
      cpus, gpus: asked for by each task; by default one GPU where the cluster has GPUs, else its CPUs shared out among
        the tasks.
      definitions: files that define mixers (`--with`), which workers read too.

    Raises:
      UserError: Ray is not installed, no cluster answers at the address, or no machine of it has what a task asks for.
    """
    ray = _ray()
    folder = folder.absolute()
    rows = members(experiments, sweep, folder)
    started_here = not ray.is_initialized()
    if started_here:
        _connect(ray, address)
    try:
        have = ray.cluster_resources()
        gpus = gpus if gpus is not None else float(have.get("GPU", 0) >= 1)
        together = gpus > 0 if together is None else together
        tasks = [_Task(group) for row in rows for group in (groups(row) if together else [[member] for member in row])]
        todo = [task for task in tasks if not all(_finished(member) for member in task.members)]
        log(f"{len(tasks)} tasks on {_shown(ray)}; {len(tasks) - len(todo)} finished before")
        cpus = cpus if cpus is not None else max(1.0, have.get("CPU", 1) // max(len(todo), 1)) if not gpus else 1.0
        _check_room(ray, cpus, gpus)
        failures = _Driver(ray, todo, folder, cpus, gpus, definitions or [], log).run() if todo else []
    finally:
        if started_here:
            ray.shutdown()
    done = [Path(member.run.directory or "") for row in rows for member in row if _finished(member)]
    return Swept(done, failures)


class _Driver:
    """Keeps all tasks submitted, starts failed ones again, and shows how far they are."""

    def __init__(
        self, ray: Any, tasks: list[_Task], folder: Path, cpus: float, gpus: float, definitions: list[Path], log: Any
    ):
        self.ray, self.tasks, self.folder = ray, tasks, folder
        environment = {} if gpus else {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
        self.remote = ray.remote(_train_group).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=0, runtime_env={"env_vars": environment}, name="recollect"
        )
        self.definitions = [str(path.absolute()) for path in definitions]
        self.failures: list[str] = []
        self.finished = 0
        self.members = [member for task in tasks for member in task.members]
        total = sum(member.run.steps for member in self.members)
        self.progress = Progress(total, "step", log, "  {status}, {done:,}/{total:,} steps")

    def run(self) -> list[str]:
        folder_token = _write_token(self.folder)
        pending = {self._submit(task): task for task in self.tasks}
        try:
            while pending:
                ready, _ = self.ray.wait(list(pending), timeout=5.0)
                for reference in ready:
                    task = pending.pop(reference)
                    if self._again(task, reference):
                        pending[self._submit(task)] = task
                self._show(len(pending))
        finally:
            for reference in pending:
                self.ray.cancel(reference)
            folder_token.unlink(missing_ok=True)
            self.progress.close()
        return self.failures

    def _show(self, pending: int) -> None:
        status = f"{self.finished} tasks done, {pending} running or waiting, {len(self.failures)} failed"
        self.progress.update(sum(_steps(member) for member in self.members), lambda: status)

    def _submit(self, task: _Task) -> Any:
        texts = [json.dumps(to_json(member)) for member in task.members]
        return self.remote.remote(texts, str(self.folder), self.definitions, os.getcwd())

    def _again(self, task: _Task, reference: Any) -> bool:
        """Takes in what became of a task; returns whether it is to be started again."""
        try:
            statuses = self.ray.get(reference)
            why = "stopped by a signal" if "preempted" in statuses else None
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else error
            why = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
            if isinstance(cause, UserError):
                self._fail(task, " ".join(str(cause).split()))
                return False
        except self.ray.exceptions.RayError as error:
            why = f"lost its worker ({type(error).__name__})"
        if why is None:
            self.finished += 1
            return False
        task.attempts += 1
        if task.attempts > RETRIES:
            self._fail(task, f"{why}, {task.attempts} times")
            return False
        self.progress.log(
            f"  {task.name}: {why}; started again from its last checkpoint ({task.attempts} of {RETRIES})"
        )
        return True

    def _fail(self, task: _Task, why: str) -> None:
        self.failures.append(f"{task.name}: {why}")
        self.progress.log(f"  failed: {self.failures[-1]}")


def _train_group(texts: list[str], folder: str, definitions: list[str], here: str) -> list[str]:
    """Runs in a worker: trains members (JSON of their configs) and returns their statuses."""
    from recollect.configuration.python_files import load_definitions
    from recollect.training.saved_experiment import experiment_from_json
    from recollect.training.sweeps.population import train_members

    if not any(Path(folder).glob(f"{_TOKEN}*")):
        raise UserError(
            f"the worker on {socket.gethostname()} does not see {folder}: "
            "give --out on a file system that all machines share"
        )
    if os.path.isdir(here):
        os.chdir(here)  # relative paths in configs mean what they meant to the caller
    for definition in definitions:
        load_definitions(Path(definition))
    group: list[Experiment] = [experiment_from_json(json.loads(text), "a task") for text in texts]
    path = Path(folder) / "logs" / f"{group[0].name}-{Path(group[0].run.directory or '').name}.txt"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", buffering=1) as file:
        file.write(f"on {socket.gethostname()}, pid {os.getpid()}\n")

        def write(line: str) -> None:
            file.write(line + "\n")

        return [result["status"] for result in train_members(group, together=len(group) > 1, log=write)]


def _finished(member: Experiment) -> bool:
    path = Path(member.run.directory or "") / "result.json"
    return path.exists() and is_done(read_json(path), member.run.steps)


def _steps(member: Experiment) -> int:
    """Returns how many steps a run has logged, from the end of its metrics.jsonl."""
    path = Path(member.run.directory or "") / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return min(int(json.loads(line)["step"]), member.run.steps)
        except (ValueError, KeyError, TypeError):  # the first line may be cut, the last one half written
            continue
    return 0


_TOKEN = ".seen-by-workers-"


def _write_token(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_TOKEN}{secrets.token_hex(8)}"
        path.touch()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return path


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--on ray needs the package ray, which is not installed: pip install 'ray>=2.40'") from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    import logging

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:  # Ray itself tries for two minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error
    try:
        if address is None:
            path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
            ray.init(address="local", include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
        else:  # its machines get a copy of this project's files
            ray.init(
                address=address,
                runtime_env={"working_dir": str(PROJECT), "excludes": [".git", ".venv*", "runs"]},
                **quiet,
            )
    except Exception as error:
        place = f"at {address}" if address else "on this machine"
        token = "" if os.environ.get("RAY_AUTH_MODE") else "; a cluster with a token needs RAY_AUTH_MODE=token here too"
        raise UserError(f"no Ray cluster {place}: {first_line(error)}{token}") from error


def _shown(ray: Any) -> str:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    totals: Counter[str] = Counter()
    for node in nodes:
        totals.update({name: int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU")})
    return f"{len(nodes)} machine{'s' if len(nodes) != 1 else ''} of Ray ({totals['CPU']} CPUs, {totals['GPU']} GPUs)"


def _check_room(ray: Any, cpus: float, gpus: float) -> None:
    """Refuses tasks that no machine can hold; they would wait without end."""
    sizes = [
        (node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]
    ]
    if not any(have_cpus >= cpus and have_gpus >= gpus for have_cpus, have_gpus in sizes):
        largest = max(sizes, key=lambda size: (size[1], size[0]), default=(0, 0))
        raise UserError(
            f"a task asks for {cpus:g} CPUs and {gpus:g} GPUs, which no machine of the cluster has; the largest has "
            f"{largest[0]:g} CPUs and {largest[1]:g} GPUs (--cpus-per-task, --gpus-per-task)"
        )
