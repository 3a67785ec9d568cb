"""`train NAME --sweep path=v1,v2,...`: a study of one experiment, made on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.experiments.compare import compare
from recollect.experiments.study import Study
from recollect.experiments.sweep_axes import study_name


def train_sweep(experiment: Any, options: Any) -> int:
    """Trains `experiment` at every combination of the values of `options.sweep`; writes table and plots into a folder
    that names the swept fields (`run.directory`, where it is set). Returns the exit code."""
    if options.processes is not None or options.coordinator:
        raise UserError("--sweep: several processes train one run; start a sweep in one process")
    name = study_name(experiment, options.sweep)
    out = Path(experiment.run.directory or Path("runs") / name)
    compare(Study((experiment,)), name, out, sweeps=options.sweep, at_once=None)
    return 0
