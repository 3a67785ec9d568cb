"""Models as GGUF files: read back tensor by tensor with the gguf package, and run by llama.cpp beside the same models
here. `python -m tests.interop.comparison --gguf` prints the rows."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from recollect.data.tokenizers import ByteTokenizer
from recollect.export.huggingface import Facts, export_huggingface
from recollect.models import FunctionalModel
from tests.export.huggingface.cases import GGUF, parameters
from tests.interop.comparison import PROJECT, PYTHON


@dataclasses.dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
      wrong: what differs in the file, a line each.
      error: largest error of the log-probability of a token, over all that llama.cpp might have generated; NaN where
        there is no llama.cpp.
      greedy_equal: whether each ASCII token that it generates is the likeliest here after those before it.
      ids_equal: whether both tokenizers give a text the same ids.
    """

    model: str
    wrong: list[str]
    error: float = float("nan")
    greedy_equal: bool | None = None
    ids_equal: bool | None = None


def rows(root: Path) -> list[Row]:
    """Returns a row per model, from folders written to `root`."""
    folders = {name: root / re.sub(r"\W+", "_", name) for name in GGUF}
    for name, folder in folders.items():
        export_huggingface(
            parameters(GGUF[name]), GGUF[name], folder / "hf", facts=Facts(name), tokenizer=ByteTokenizer()
        )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    side = [PYTHON, Path(__file__).with_name("gguf_side.py"), root]
    done = subprocess.run(side, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [_row(name, folder) for name, folder in folders.items()]


def _row(name: str, folder: Path) -> Row:
    wrong = (folder / "wrong.txt").read_text().splitlines()
    if not (folder / "llama_cpp.npz").exists():
        return Row(name, wrong)
    theirs = np.load(folder / "llama_cpp.npz")
    model, params = FunctionalModel(GGUF[name], 257), parameters(GGUF[name])
    tokens = jnp.asarray([[*theirs["prompt"], *theirs["tokens"][:-1]]], jnp.int32)
    logits = jax.jit(lambda params, tokens: model.bind(params)(tokens)[0])(params, tokens)[len(theirs["prompt"]) - 1 :]
    error = float(np.abs(np.asarray(jax.nn.log_softmax(logits)) - theirs["log_probs"]).max())
    greedy = bool((np.asarray(logits)[:, :128].argmax(-1) == theirs["tokens"]).all())
    ids = ByteTokenizer().encode(str(theirs["text"])).tolist()
    return Row(name, wrong, error, greedy, theirs["ids"].tolist() == ids)


def print_rows(root: Path) -> None:
    """Prints the table."""
    print("| model | tensors equal | largest error of a log-probability | greedy tokens equal | same token ids |")
    print("|---|---|---|---|---|")
    for row in rows(root):
        marks = ("yes" if mark else "no" for mark in (row.greedy_equal, row.ids_equal))
        print(f"| {row.model} | {'no' if row.wrong else 'yes'} | {row.error:.1e} | {' | '.join(marks)} |")
