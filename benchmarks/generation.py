"""Times generation: tokens per second of prefill and decoding and measured bytes of state, against context and batch.

    python main.py bench generation                 # on a CPU: three pretrain.*_30m at 256 to 2,048 tokens
    python main.py bench generation --mixers all    # every mixer that streams, in a model of 1.2M parameters
    python main.py bench generation --models based_1b attention_1b --lengths 4096 --batches largest

The last is what a GPU runs by default: Based beside full attention with its cache, bf16 parameters and activations,
each at the largest batch whose state fits the free memory (after running out of memory, once more with three quarters).
How many times as fast as full attention a model decodes is printed for each length. Weights are random and made on the
device.

    python main.py bench generation --models attention_30m --peer-python PYTHON    # beside transformers on torch

A row is one model at one length, the capacity of the state, and one batch. Decoding: a state of that capacity, then
calls of the compiled loop that each decode 16 tokens in every row, the first call unmeasured; the median of the others
counts. What the state holds changes nothing: attention reads every slot and masks the free ones. Prefill: prompts that
fill all but these tokens, in chunks through `extend`, on at most `--prefill-rows` rows, the second of two times. On an
accelerator the decoding loops of all rows are compiled side by side, then timed; then the same for prefill. Rows are
written as they come; with --seconds nothing is begun later.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from recollect import layers
from recollect.benchmarks import peer_process, reporting, timing
from recollect.benchmarks.generation_cell import Cell, Subject
from recollect.configuration import UserError, machine
from recollect.evaluation.plots import NothingToPlot, decoding_by_context
from recollect.evaluation.table import format_bytes
from recollect.experiments import registry
from recollect.experiments.pretrain import small
from recollect.export.huggingface import Facts, export_huggingface
from recollect.models import LanguageModel
from recollect.models.generation import PIECE

ON_CPU = {"models": ["attention_30m", "based_30m", "window_30m"], "lengths": [256, 1024, 2048], "batches": ["1", "8"]}
ON_ACCELERATORS = {"models": ["based_1b", "attention_1b"], "lengths": [4096], "batches": ["largest"]}
GPT2_VOCABULARY = 50_304
"""GPT-2's, in whole blocks of 64: the published models', which the bytes of `pretrain`'s default source are not."""
MIXERS = {config.__name__: config for config in layers.MIXERS}
OPTIONS = {
    "models": {
        "nargs": "+",
        "metavar": "NAME",
        "help": "experiments: based_30m (of pretrain), or text.based",
    },
    "mixers": {"nargs": "+", "metavar": "NAME", "help": "mixers, each in a model of 1.2M parameters; all: every one"},
    "lengths": {"nargs": "+", "type": int, "metavar": "N", "help": "tokens of prompt and continuation together"},
    "batches": {"nargs": "+", "metavar": "N", "help": "rows; largest: as many as fit an accelerator's memory"},
    "pieces": reporting.number(3, f"timed calls of {PIECE} tokens"),
    "prefill-rows": reporting.number(8, "most rows of a timed prefill"),
    "vocabulary": {"type": int, "metavar": "N", "help": "default: the experiment's; on accelerators 50,304"},
    "seconds": reporting.number(3600.0, "begin no row later"),
    "peer-python": {"metavar": "PYTHON", "help": "an interpreter with transformers: time exported models beside ours"},
    "plot": {"metavar": "FILE", "help": "draw decoding against context; with --out it is generation.png there"},
}


COLUMNS = {"tokens": 8, "batch": 7, "state": 11, "prefill/s": 13, "decoded/s": 13, "ms per step": 13, "bandwidth": 11}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a row could not be measured.

    Raises:
      UserError: an option that does not fit, or an experiment that there is not.
    """
    begun = time.perf_counter()
    parser = reporting.Parser("generation", __doc__, OPTIONS, "generation.json")
    options = parser.parse(arguments, positive=("pieces", "prefill_rows", "seconds"))
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # jax takes three quarters of a GPU by default
    on_accelerator = jax.default_backend() != "cpu"
    _fill_in(parser, options, on_accelerator)
    machine.keep_compiled_programs(None)
    reporting.print_device()
    print(" " * 26 + "".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    rows: list[dict] = []

    def keep(unfinished: str | None = None) -> Path | None:
        facts = {"rows": rows, "ratios": ratios(rows)}
        return reporting.keep(options.out, "generation.json", "generation", arguments, facts, unfinished=unfinished)

    cells = _cells(options)
    for part in [list(cells)] if on_accelerator else ([cell] for cell in cells):
        for what in ("decode", "prefill"):
            if time.perf_counter() - begun > options.seconds:
                print(f"{what}: no time left")
                break
            compile_together(part, what)
            for cell in part:
                cell.measure(what)
                print(_line(cell.row, what), flush=True)
                if options.peer_python and what == "prefill":
                    cell.row["peer"] = peer(cell, options.peer_python)
                    print(_peer_line(cell.row), flush=True)
                rows += [] if cell.row in rows else [cell.row]
                keep(cell.subject.name)
                if cell is part[-1] or part[part.index(cell) + 1].subject is not cell.subject:
                    cell.subject.params = None
    for line in ratios(rows):
        print(line)
    if not on_accelerator and any(row.get("others", 0) > timing.QUIET for row in rows):
        print("other programs ran meanwhile: NOT TO BE QUOTED")
    kept = keep()
    if plot := options.plot or (kept and kept.with_suffix(".png")):
        _draw(rows, Path(plot))
    return int(any(key.endswith("_error") for row in rows for key in row))


def _fill_in(parser: reporting.Parser, options: argparse.Namespace, on_accelerator: bool) -> None:
    defaults = ON_ACCELERATORS if on_accelerator else ON_CPU
    if options.mixers is None and options.models is None:
        options.models = defaults["models"]
    if options.mixers and options.mixers != ["all"] and (unknown := set(options.mixers) - set(MIXERS)):
        parser.error(f"no mixer {unknown.pop()!r}; there are all, {', '.join(MIXERS)}")
    for name in ("lengths", "batches"):
        setattr(options, name, getattr(options, name) or defaults[name])
    least = PIECE * (1 + options.pieces) + 1
    if min(options.lengths) < least:
        parser.error(f"--lengths {min(options.lengths)}: at least {least} are needed with --pieces {options.pieces}")
    for batch in options.batches:
        if batch == "largest" and not on_accelerator:
            parser.error("--batches largest: only accelerators have a memory of their own; name numbers")
        if batch != "largest" and not (batch.isdecimal() and int(batch)):
            parser.error(f"--batches {batch}: must be positive numbers, or largest")
    if options.vocabulary is None and on_accelerator:
        options.vocabulary = GPT2_VOCABULARY


def _subjects(options: argparse.Namespace) -> Iterable[tuple[str, LanguageModel, int]]:
    """Yields name, config and vocabulary of what is measured, one after another."""
    for name in options.models or ():
        experiment = registry.load(name if "." in name else f"pretrain.{name}", "experiment")
        yield name, experiment.model, options.vocabulary or experiment.data.vocabulary
    names = list(MIXERS) if options.mixers == ["all"] else options.mixers or ()
    for name in names:
        config = MIXERS[name]()
        if config.traits.streams:
            experiment = small(name, config)
            yield name, experiment.model, options.vocabulary or experiment.data.vocabulary


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yields what is measured: each model, at every length and batch."""
    for subject in itertools.starmap(Subject, _subjects(options)):
        for length, asked in itertools.product(options.lengths, options.batches):
            yield Cell(subject, length, asked, options.pieces, options.prefill_rows)


def compile_together(cells: list[Cell], what: str) -> None:
    """Compiles a part of every cell, and what makes the weights, in threads; what cannot be compiled is left to
    `Cell.measure`, whose row then has the error."""
    subjects = dict.fromkeys(cell.subject for cell in cells)
    with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.suppress(jax.errors.JaxRuntimeError):
        made = pool.map(Subject.compile, subjects)
        list(itertools.chain(pool.map(lambda cell: cell.compile(what), cells), made))


def peer(cell: Cell, python: str) -> dict[str, Any]:
    """Returns what generation_peer.py answers for the exported model, or {"error"}.

    Raises:
      UserError: the interpreter does not start.
    """
    subject, row = cell.subject, cell.row
    case = {"rows": row["rows"], "prompt": cell.length - cell.tokens, "piece": PIECE, "pieces": cell.pieces}
    with tempfile.TemporaryDirectory() as folder:
        try:
            params = jax.device_get(subject.make(jax.random.key(0)))
            export_huggingface(params, subject.config, Path(folder) / "exported", facts=Facts(subject.name))
        except UserError as error:
            return {"error": str(error)[:200]}
        with contextlib.closing(peer_process.PeerProcess("--peer-python", python, ["generation_peer.py"])) as process:
            return process.ask({**case, "folder": str(Path(folder) / "exported")})


def ratios(rows: list[dict]) -> list[str]:
    """Returns a line for every row beside full attention's at the same length and batch."""
    lines, decoded = [], [row for row in rows if "step_seconds" in row]
    for row, other in itertools.product(decoded, decoded):
        same = (row["length"], row["asked"]) == (other["length"], other["asked"])
        if same and other["attention"] and not row["attention"]:
            times = row["decode_tokens_per_second"] / other["decode_tokens_per_second"]
            lines.append(
                f"{row['name']} decodes {times:.2f} times as many tokens per second as {other['name']} at "
                f"{row['length']:,} tokens ({row['rows']:,} rows and {other['rows']:,})"
            )
    return lines


def _line(row: dict, what: str) -> str:
    head = f"{row['name'][:25]:26}{row['length']:8,}{row['rows']:7,}"
    if error := row.get(f"{what}_error"):
        return f"{head}  {what}: {error}"
    if what == "prefill":
        return f"{head}{'':11}{row['prefill_tokens_per_second']:13,.0f}  ({row['prefill_rows']} rows)"
    bandwidth = f"{row['bandwidth']:.0%}" if "bandwidth" in row else "-"
    rates = f"{'':13}{row['decode_tokens_per_second']:13,.0f}{1e3 * row['step_seconds']:13.2f}"
    return f"{head}{format_bytes(row['state_bytes']):>11}{rates}{bandwidth:>11}"


def _peer_line(row: dict) -> str:
    theirs = row["peer"]
    if "error" in theirs:
        return f"  peer: {theirs['error']}"
    times = [
        row[name] / theirs[name] for name in ("prefill_tokens_per_second", "decode_tokens_per_second") if name in row
    ]
    rates = f"{theirs['prefill_tokens_per_second']:,.0f} and {theirs['decode_tokens_per_second']:,.0f} per second"
    return f"  {theirs['version']}: {rates}; ours is {' and '.join(f'{one:.2f}' for one in times)} times as fast"


def _draw(rows: list[dict], path: Path) -> None:
    """Draws the rows, or says why not: a machine with a GPU may have no matplotlib."""
    try:
        decoding_by_context([row for row in rows if "step_seconds" in row], path)
    except (ImportError, NothingToPlot) as error:
        print(f"no plot: {error}")
    else:
        print(f"written: {path}")
