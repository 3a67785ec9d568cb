"""Runs a study, then writes its table and plots: what `main.py compare` does."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from recollect.configuration import UserError, apply_overrides
from recollect.configuration.io import replace_text
from recollect.configuration.names import nearest
from recollect.configuration.python_files import USER_FILES
from recollect.evaluation.matrix import format_matrix
from recollect.evaluation.plots import draw_all
from recollect.evaluation.report import write_report
from recollect.evaluation.results import find_runs, load_runs
from recollect.evaluation.study_results import write_study_results
from recollect.evaluation.summaries import group_by_task, summarise, task_name
from recollect.evaluation.table import format_table, write_csv
from recollect.experiments.orderings import Ordering, checked
from recollect.experiments.study import Study, add_mixers
from recollect.experiments.sweep_axes import NOT_SWEPT, swept
from recollect.training.experiment import Experiment
from recollect.training.sweeps.study import run_study


def compare(
    study: Study,
    name: str,
    out: Path,
    *,
    files: Sequence[ModuleType] = (),
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    at_once: int | None = 1,
    together: bool | None = None,
    on: str | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    formats: Sequence[str] = ("png",),
    titles: bool = False,
) -> None:
    """Trains what a study lacks, prints its table, and writes results.csv and the plots to `out`.

    Runs that `out` holds of another part of the study are in the table too.

    Args:
      name: of the study, for messages.
      files: of the user's, which define mixers that are compared too.
      only: names of the study's experiments, and of its tasks, to run; none of either: all. Mixers of `files` always
        are.
      overrides: `path=value`, applied to every experiment; one of a swept field takes the place of that axis.
      sweeps: `path=v1,v2,...`, axes beside the study's or in the place of one.
      at_once: processes that train; None: two where that is worth it (see `run_study`).
      together: whether members that differ in values only are trained at once; None: on accelerators.
      on: "ray" or "ray:ADDRESS" trains on a cluster, with `cpus` and `gpus` for each task; None: in this process.
      formats, titles: of the figures (see `draw_all`).

    Raises:
      UserError: the study has no such experiment, or none at all, an override is wrong, or tasks of the cluster failed
        (after the table of the others is written).
    """
    for override in overrides:
        if (path := override.partition("=")[0]) in NOT_SWEPT:
            raise UserError(f"{override}: {name} has several runs, and {path} {NOT_SWEPT[path]}")
    added = add_mixers(study, name, list(files))
    experiments = [*study.experiments, *added]
    if not experiments:
        raise UserError(f"{name} has no experiments: there is nothing to train")
    names = list(dict.fromkeys(experiment.name for experiment in experiments))
    tasks = list(dict.fromkeys(experiment.task for experiment in experiments if experiment.task))
    for unknown in [chosen for chosen in only if chosen not in [*names, *tasks]]:
        has = ", ".join([*names, *tasks])
        raise UserError(f"{name} has no experiment {unknown!r}{nearest(unknown, [*names, *tasks])}; it has {has}")
    experiments = [
        apply_overrides(experiment, list(overrides), functools.partial(print, f"{experiment.name}:"))
        for experiment in experiments
        if _chosen(experiment.task, tasks, only) and (experiment in added or _chosen(experiment.name, names, only))
    ]
    study = dataclasses.replace(study, sweep=swept(study.sweep, sweeps, overrides, experiments[-1]))
    failures: list[str] = []
    if on is None:
        folders = run_study(
            experiments,
            study.sweep,
            out,
            together=together,
            at_once=at_once,
            definitions=list(USER_FILES),
            estimate=any(experiment.task for experiment in experiments),
        )
    else:
        folders, failures = _run_on_ray(experiments, study, out, on, together, cpus, gpus, list(USER_FILES))
    if failures and not folders:
        raise UserError(f"no run of {name} finished; {failures[0]}")
    report([*folders, *_others(folders, out)], out, formats, titles, study.expects)
    if failures:
        raise UserError(
            f"{len(failures)} of the study's tasks failed ({'; '.join(failures)}); the table and plots are without them"
        )


def _chosen(name: str, names: Sequence[str], only: Sequence[str]) -> bool:
    """Returns whether `only` names this one of `names`, or none of them."""
    return name in only or not set(names) & set(only)


def _others(folders: Sequence[Path], out: Path) -> list[Path]:
    """Returns the finished runs of a study's folder that are not among `folders`: a run of a part of it keeps them."""
    asked = {folder.resolve() for folder in folders}
    others = [run for run in find_runs([str(out)], lambda line: None) if run.resolve() not in asked]
    if others:
        many = len(others) > 1
        print(f"{len(others)} run{'s'[:many]} that {out} holds beside these {'are' if many else 'is'} shown too")
    return others


def _without_folder(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's config without its folder."""
    return {**config, "run": {**config.get("run", {}), "directory": None}}


def report(
    folders: Sequence[Path],
    out: Path,
    formats: Sequence[str] = ("png",),
    titles: bool = False,
    expects: Sequence[Ordering] = (),
) -> None:
    """Prints the tables of finished runs; writes results.csv, results.json and the plots. Scores of different tasks or
    metrics share no axis: where there are several, each has its plots in a folder below `out`. Where tasks have names,
    a table of mixers and tasks is printed, and each task's own goes to tables.txt. What is expected is checked."""
    runs = load_runs(folders)
    repeated = len(runs) - len({json.dumps(_without_folder(run.config)) for run in runs})
    if repeated:
        print(f"{repeated} of {len(runs)} runs repeat another's config and seed; a seed counts once, with its mean")
    write_csv(out / "results.csv", runs)
    write_study_results(out / "results.json", runs)
    summaries = summarise(runs)
    if any(run.config.get("task") for run in runs) and len({summary.task for summary in summaries}) > 1:
        print(format_matrix(summaries))
        replace_text(out / "tables.txt", format_table(summaries) + "\n")
        print(f"\na table of each task: {out / 'tables.txt'}")
    else:
        print(format_table(summaries))
    named = [dataclasses.replace(one, task=one.task or task_name(runs[0])) for one in summaries]
    for _, _, line in checked(expects, named):
        print(line)
    print(f"table: {out / 'results.csv'}, results.json")
    for task, asked in group_by_task(runs).items():
        folder = out / re.sub(r"[^\w.=,+-]+", "_", task).strip("_") if task else out
        title = f"{out.name} {task}".strip() if titles else None
        drawn = draw_all(asked, folder, formats, title)
        print(f"plots{f' of {task}' if task else ''}: {', '.join(map(str, drawn))}")
    write_report(folders, out / "report.html", out.name)
    print(f"page: {out / 'report.html'}")


def _run_on_ray(
    experiments: list[Experiment],
    study: Study,
    out: Path,
    on: str,
    together: bool | None,
    cpus: float | None,
    gpus: float | None,
    definitions: list[Path],
) -> tuple[list[Path], list[str]]:
    """Returns the folders of runs that are done, and what failed."""
    from recollect.training.sweeps.ray_sweep import run_study_on_ray

    system, _, address = on.partition(":")
    if system != "ray":
        raise UserError(f"--on {on}: there is ray, or ray:ADDRESS of a running cluster")
    for option, value in (("--cpus-per-task", cpus), ("--gpus-per-task", gpus)):
        if value is not None and value < 0:
            raise UserError(f"{option} {value:g}: must not be negative")
    return run_study_on_ray(
        experiments,
        study.sweep,
        out,
        address=address or None,
        together=together,
        cpus=cpus,
        gpus=gpus,
        definitions=definitions,
    )
