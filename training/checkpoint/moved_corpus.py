"""Whether a run may go on from another source of text: only if it holds the corpus that the run was trained on."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.read_json import read_json
from recollect.training.checkpoint.orbax_folder import Checkpoints


def check_same_corpus(folder: Path, experiment: Any, changed: dict[str, tuple[Any, Any]]) -> None:
    """Raises UserError unless the data of `experiment` are the corpus of the run in `folder`.

    Args:
      changed: the fields that say where the text is, with their values there and now.
    """
    fields = "; ".join(f"{path}: {there!r} there, {now!r} now" for path, (there, now) in changed.items())
    digest = trained_digest(folder)
    if digest is None:
        raise UserError(f"{folder} holds a run with another config ({fields}); choose another run.directory")
    now = experiment.data.corpus_digest()
    if now != digest:
        raise UserError(
            f"{folder} holds a run with another config ({fields}) and another corpus (sha256 {digest[:12]} there, "
            f"{str(now)[:12]} now); choose another run.directory"
        )


def trained_digest(folder: Path) -> str | None:
    """Returns the digest of the corpus that the run in `folder` was trained on, by its checkpoints or its result."""
    checkpoints = folder / "checkpoints"
    for step in reversed(Checkpoints(checkpoints).steps()):
        with contextlib.suppress(UserError, KeyError, TypeError):
            return read_json(checkpoints / str(step) / "meta.json")["extra"]["data_state"]["corpus"]
    with contextlib.suppress(UserError, KeyError, TypeError):
        return read_json(folder / "result.json")["corpus"]["digest"]
    return None
