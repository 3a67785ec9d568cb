"""Whether a run that a folder holds may go on with another config."""

from __future__ import annotations

from pathlib import Path

import chz

from recollect.configuration import UserError, differences, from_json
from recollect.configuration.read_json import read_json
from recollect.training.experiment import AROUND_STEPS, Experiment, Mesh

CHANGEABLE = (
    "run.steps",
    "data.held_out_bytes",
    *(f"run.mesh.{axis}" for axis in chz.chz_fields(Mesh)),
    *(f"run.{name}" for name in AROUND_STEPS),
)
"""Fields that may change when a run is resumed."""

CORPUS_FIELDS = frozenset({"data.source", "data.tokenizer", "data.start_token"})
"""Fields that may change as long as the corpus, by its digest, does not."""


def check_resumable(folder: Path, experiment: Experiment) -> None:
    """Raises UserError where the run in `folder` was trained with another config; it lists the fields that differ."""
    trained = any((folder / name).exists() for name in ("metrics.jsonl", "result.json"))
    if not trained and not any((folder / "checkpoints").glob("[0-9]*")):
        return  # nothing was trained there: the new config takes its place
    before = from_json(read_json(folder / "config.json"))
    changed = {path: pair for path, pair in differences(before, experiment).items() if path not in CHANGEABLE}
    if changed and changed.keys() <= CORPUS_FIELDS:
        from recollect.training.checkpoint.moved_corpus import check_same_corpus

        check_same_corpus(folder, experiment, changed)
    elif changed:
        shown = "; ".join(f"{path}: {was!r} there, {now!r} now" for path, (was, now) in list(changed.items())[:6])
        more = f" (and {len(changed) - 6} more)" if len(changed) > 6 else ""
        raise UserError(f"{folder} holds a run with another config ({shown}{more}); choose another run.directory")
