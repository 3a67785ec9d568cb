"""Runs that are named with a step: RUN is a run's newest checkpoint, RUN:500 that of step 500."""

from __future__ import annotations

from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.machine import expanded
from recollect.configuration.user_paths import path_kind
from recollect.export.safetensors_format import MANIFEST
from recollect.training.checkpoint.orbax_folder import Checkpoints


def run_at(name: Path | str, said: str = "") -> tuple[Path, int | None]:
    """Returns the folder and the step (None: the newest) that a name means; a folder whose name is that comes first.

    Args:
      name: a path, maybe followed by a colon and a step.
      said: how errors begin.

    Raises:
      UserError: the folder has no checkpoint of that step.
    """
    text = str(name)
    begin = f"{said or text}: "
    head, _, tail = text.rpartition(":")
    whole = expanded(text, said or text)
    if not (head and tail.isdecimal()) or path_kind(whole, said or text) is not None:
        return whole, None
    path, step = expanded(head, said or text), int(tail)
    if (path / "checkpoints").is_dir():
        steps = Checkpoints(path / "checkpoints").steps()
        if step not in steps:
            listed = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{begin}{path} has no checkpoint of step {step}; there are {listed}")
    elif (path / MANIFEST).is_file():
        raise UserError(f"{begin}{path} is an export, which has one step; leave :{step} out")
    return path, step
