"""Runs a study, then writes its table and plots: what `main.py compare` does."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from recollect.configuration import UserError, apply_overrides
from recollect.configuration.python_files import USER_FILES
from recollect.evaluation.plots import accuracy_by_slice, learning_curves, recall_vs_state
from recollect.evaluation.results import load_runs, summarise
from recollect.evaluation.table import format_table, write_csv
from recollect.experiments.study import Study, add_mixers
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
    together: bool | None = None,
    on: str | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
) -> None:
    """Trains what a study lacks, prints its table, and writes results.csv and the plots to `out`.

    Args:
      name: of the study, for messages.
      files: of the user's, which define mixers that are compared too.
      only: names of the experiments to run; empty: all.
      overrides: `path=value`, applied to every experiment.
      together: whether members that differ in values only are trained at once; None: on accelerators.
      on: "ray" or "ray:ADDRESS" trains on a cluster, with `cpus` and `gpus` for each task; None: in this process.

    Raises:
      UserError: the study has no such experiment, an override is wrong, or tasks of the cluster failed (after the table
        of the others is written).
    """
    experiments = [*study.experiments, *add_mixers(study, name, list(files))]
    names = [experiment.name for experiment in experiments]
    for unknown in [chosen for chosen in only if chosen not in names]:
        raise UserError(f"{name} has no experiment {unknown!r}; it has {', '.join(names)}")
    experiments = [
        apply_overrides(experiment, list(overrides)) for experiment in experiments if experiment.name in (only or names)
    ]
    failures: list[str] = []
    if on is None:
        folders = run_study(experiments, study.sweep, out, together=together)
    else:
        folders, failures = _run_on_ray(experiments, study, out, on, together, cpus, gpus, list(USER_FILES))
    if failures and not folders:
        raise UserError(f"no run of {name} finished; {failures[0]}")
    _report(folders, out)
    if failures:
        raise UserError(
            f"{len(failures)} of the study's tasks failed ({'; '.join(failures)}); the table and plots are without them"
        )


def _report(folders: Sequence[Path], out: Path) -> None:
    """Prints the table of finished runs; writes results.csv and the plots."""
    runs = load_runs(folders)
    summaries = summarise(runs)
    print(format_table(summaries))
    write_csv(out / "results.csv", runs)
    recall = [summary for summary in summaries if summary.metric == "accuracy"]
    # Accuracy and bits per byte share no axis: a study that mixes them is drawn for recall.
    accuracy_by_slice(recall or summaries, out / "accuracy_by_slice.png")
    learning_curves([run for run in runs if not recall or run.metric == "accuracy"], out / "learning_curves.png")
    print(f"table: {out / 'results.csv'}; plots: {out / 'accuracy_by_slice.png'}, {out / 'learning_curves.png'}")
    if recall:
        recall_vs_state(recall, out / "recall_vs_state.png")
        print(f"recall against state size: {out / 'recall_vs_state.png'}")


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
