"""Trains a study over the machines of a Ray cluster: `python main.py compare STUDY --on ray[:ADDRESS]`.

A task trains one group of members (all that compile to one program where they train at once, on accelerators; one
member otherwise) with the same calls as without Ray, in the same folders, so the results are the same. What is lost
with a worker is what it did since its last checkpoint: the task is started again and its runs go on from there.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recollect.configuration import UserError, to_json
from recollect.configuration.console import NOW, doing
from recollect.configuration.io import first_line
from recollect.configuration.machine import PROJECT
from recollect.training.experiment import Experiment
from recollect.training.run_state import run_directory
from recollect.training.sweeps.member_folders import members
from recollect.training.sweeps.study import groups, is_finished

RETRIES = 3
"""Times that a task is started again after its worker was lost or it ended with an error that is not the user's."""

_TOKEN = ".seen-by-workers-"
"""How the name of a file begins that a worker must find in the study's folder."""


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
) -> tuple[list[Path], list[str]]:
    """Trains what is not finished, as tasks of a Ray cluster; returns the folders of runs that are done, in the study's
    order, and one line for each task that failed.

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
        machines = [collections.Counter(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        have = sum(machines, collections.Counter())
        gpus = gpus if gpus is not None else float(have["GPU"] >= 1)
        together = gpus > 0 if together is None else together
        tasks = [group for row in rows for group in (groups(row) if together else [[member] for member in row])]
        todo = [task for task in tasks if not all(map(is_finished, task))]
        log(
            f"{len(tasks)} tasks on {len(machines)} machine{'s' if len(machines) != 1 else ''} of Ray "
            f"({have['CPU']:.0f} CPUs, {have['GPU']:.0f} GPUs); {len(tasks) - len(todo)} finished before"
        )
        if cpus is None:
            cpus = 1.0 if gpus else max(1.0, have["CPU"] // max(len(todo), 1))
        _check_room(machines, cpus, gpus)
        environment = {} if gpus else {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
        options = {"max_retries": 0, "runtime_env": {"env_vars": environment}, "name": "recollect"}
        remote = ray.remote(_train_group).options(num_cpus=cpus, num_gpus=gpus, **options)
        there = str(folder), [str(path.absolute()) for path in definitions or []], os.getcwd()
        failures = _train_all(
            ray, todo, folder, lambda task: remote.remote([json.dumps(to_json(one)) for one in task], *there), log
        )
    finally:
        if started_here:
            ray.shutdown()
    return [run_directory(member) for row in rows for member in row if is_finished(member)], failures


def _train_all(
    ray: Any, tasks: list[list[Experiment]], folder: Path, submit: Callable[[list[Experiment]], Any], log: Any
) -> list[str]:
    """Keeps all tasks submitted, starts failed ones again, shows how far they are; returns a line for each that
    failed for good."""
    everyone = [member for task in tasks for member in task]
    total = sum(member.run.steps for member in everyone)
    failures: list[str] = []
    tries: collections.Counter[str] = collections.Counter()
    token = _write_token(folder)
    pending = {submit(task): task for task in tasks}

    def status() -> str:
        done = len(tasks) - len(pending) - len(failures)
        return f"{done} tasks done, {len(pending)} running or waiting, {len(failures)} failed"

    try:
        while pending:
            for reference in ray.wait(list(pending), timeout=5.0)[0]:
                task = pending.pop(reference)
                why, may_help = _failure(ray, reference)
                if why is None:
                    continue
                name = _name(task)
                tries[name] += 1
                if may_help and tries[name] <= RETRIES:
                    again = f"started again from its last checkpoint ({tries[name]} of {RETRIES})"
                    log(f"  {name}: {why}; {again}")
                    pending[submit(task)] = task
                else:
                    failures.append(f"{name}: {why}" + (f", {tries[name]} times" if may_help else ""))
                    log(f"  failed: {failures[-1]}")
            done = sum(map(_steps, everyone))
            doing(f"{status()}, {done:,}/{total:,} steps", (done, total, str))
    finally:
        for reference in pending:
            ray.cancel(reference)
        token.unlink(missing_ok=True)
        NOW.job = None
    return failures


def _failure(ray: Any, reference: Any) -> tuple[str | None, bool]:
    """Returns why a task failed (None: it did not), and whether starting it again may help."""
    try:
        return "stopped by a signal" if "preempted" in ray.get(reference) else None, True
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else error
        if isinstance(cause, UserError):
            return " ".join(str(cause).split()), False
        return (str(cause).strip() or type(cause).__name__).splitlines()[-1], True
    except ray.exceptions.RayError as error:
        return f"lost its worker ({type(error).__name__})", True


def _name(task: list[Experiment]) -> str:
    first = run_directory(task[0])
    return f"{first.parent.name}/{first.name}" + (f" and {len(task) - 1} more" if len(task) > 1 else "")


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
    path = Path(folder) / "logs" / f"{group[0].name}-{run_directory(group[0]).name}.txt"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", buffering=1) as file:
        print(f"on {socket.gethostname()}, pid {os.getpid()}", file=file)
        results = train_members(group, together=len(group) > 1, log=functools.partial(print, file=file))
    return [result["status"] for result in results]


def _steps(member: Experiment) -> int:
    """Returns how many steps a run has logged, from the end of its metrics.jsonl."""
    path = run_directory(member) / "metrics.jsonl"
    lines: list[bytes] = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the first may be cut, the last half written
            return min(int(json.loads(line)["step"]), member.run.steps)
    return 0


def _write_token(folder: Path) -> Path:
    path = folder / f"{_TOKEN}{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:  # Ray itself tries for two minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        options |= {"address": "local", "include_dashboard": False, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    else:  # its machines get a copy of this project's files
        files = {"working_dir": str(PROJECT), "excludes": [".git", ".venv*", "runs"]}
        options |= {"address": address, "runtime_env": files}
    try:
        ray.init(**options)
    except Exception as error:
        place = f"at {address}" if address else "on this machine"
        token = "" if os.environ.get("RAY_AUTH_MODE") else "; a cluster with a token needs RAY_AUTH_MODE=token here too"
        raise UserError(f"no Ray cluster {place}: {first_line(error)}{token}") from error


def _check_room(machines: list[collections.Counter[str]], cpus: float, gpus: float) -> None:
    """Refuses tasks that no machine can hold; they would wait without end."""
    if not any(machine["CPU"] >= cpus and machine["GPU"] >= gpus for machine in machines):
        most_gpus, most_cpus = max(((machine["GPU"], machine["CPU"]) for machine in machines), default=(0, 0))
        raise UserError(
            f"a task asks for {cpus:g} CPUs and {gpus:g} GPUs, which no machine of the cluster has; the largest has "
            f"{most_cpus:g} CPUs and {most_gpus:g} GPUs (--cpus-per-task, --gpus-per-task)"
        )
