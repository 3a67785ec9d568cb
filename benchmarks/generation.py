"""Times generation: tokens per second of prefill and decoding and measured bytes of state, against context and batch.

    python main.py bench generation                 # on a CPU: three pretrain.*_30m at 256 to 2,048 tokens
    python main.py bench generation --mixers all    # every mixer that streams, in a model of 1.2M parameters
    python main.py bench generation --models based_1b attention_1b --lengths 4096 --batches largest

The last is what a GPU runs by default: Based beside full attention with its cache, bf16 parameters and activations,
each at the largest batch whose state fits the free memory (after running out of memory, once more with three quarters).
How many times as fast as full attention a model decodes is printed for each length. Weights are random and made on the
device.

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
import dataclasses
import functools
import gc
import itertools
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect import layers
from recollect.benchmarks import reporting, timing
from recollect.configuration import UserError, machine
from recollect.evaluation.plots import NothingToPlot, decoding_by_context
from recollect.evaluation.table import format_bytes
from recollect.experiments import registry
from recollect.experiments.pretrain import small
from recollect.models import FunctionalModel, LanguageModel, count, state_bytes
from recollect.models.generation import PIECE, Generation, chunk_of, programs_of
from recollect.models.language_model import DTYPES
from recollect.models.sampling import Sampling
from recollect.training.monitoring.chips import chip_of

ON_CPU = {"models": ["attention_30m", "based_30m", "window_30m"], "lengths": [256, 1024, 2048], "batches": ["1", "8"]}
ON_ACCELERATORS = {"models": ["based_1b", "attention_1b"], "lengths": [4096], "batches": ["largest"]}
GPT2_VOCABULARY = 50_304
"""GPT-2's, in whole blocks of 64: the published models', which the bytes of `pretrain`'s default source are not."""
MIXERS = {config.__name__: config for config in layers.MIXERS}
GREEDY = Sampling(temperature=0)
KEPT_FREE = 0.12
"""Share of the free memory that the largest batch's state leaves to activations."""
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
    print(
        f"{'':26}{'tokens':>8}{'batch':>7}{'state':>11}{'prefill':>13}{'decode':>13}{'ms a step':>11}{'bandwidth':>11}"
    )
    rows: list[dict] = []

    def keep(unfinished: str | None) -> Path | None:
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
                rows += [] if cell.row in rows else [cell.row]
                keep(cell.subject.name)
                if cell is part[-1] or part[part.index(cell) + 1].subject is not cell.subject:
                    cell.subject.params = None
    for line in ratios(rows):
        print(line)
    if not on_accelerator and any(row.get("others", 0) > timing.QUIET for row in rows):
        print("other programs ran meanwhile: NOT TO BE QUOTED")
    kept = reporting.keep(
        options.out, "generation.json", "generation", arguments, {"rows": rows, "ratios": ratios(rows)}
    )
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


class Subject:
    """A model with random weights, made on the device in the dtype of its activations."""

    def __init__(self, name: str, config: LanguageModel, vocabulary: int):
        self.name, self.config = name, config
        self.model = FunctionalModel(config, vocabulary)
        self.programs = programs_of(self.model, GREEDY)
        dtype = DTYPES[config.dtype]
        self.make: Any = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), self.model.init(key)))
        self.shapes = jax.eval_shape(self.make, jax.random.key(0))
        self.params: Any = None

    def facts(self) -> dict[str, Any]:
        """Returns what is the same in every row."""
        return {
            "name": self.name,
            "mixer": type(self.config.mixers[0]).__name__,
            "attention": all(type(mixer) is layers.Attention for mixer in self.config.mixers),
            "parameters": count(self.shapes),
            "parameter_bytes": state_bytes(self.shapes),
            "vocabulary": self.model.vocabulary,
            "dtype": self.config.dtype,
        }

    def compile(self) -> None:
        """Compiles what makes the weights."""
        if hasattr(self.make, "lower"):
            self.make = self.make.lower(jax.random.key(0)).compile()

    def state(self, rows: int, length: int) -> Any:
        """Returns shapes and dtypes of the state of some rows."""
        return jax.eval_shape(lambda params: self.model.bind(params).init_state(rows, length), self.shapes)


class Cell:
    """One row: a model at one length and batch.

    Args:
      asked: a number of rows, or "largest".
    """

    def __init__(self, subject: Subject, length: int, asked: str, pieces: int, prefill_rows: int):
        self.subject, self.length, self.pieces = subject, length, pieces
        self.tokens = PIECE * (1 + pieces)
        rows = self.largest_batch() if asked == "largest" else int(asked)
        self.prefill_rows = min(rows, prefill_rows)
        self.row: dict[str, Any] = {**subject.facts(), "length": length, "asked": asked, "rows": rows, "attempts": 1}
        self.compiled: dict[str, Any] = {}

    def compile(self, what: str) -> None:
        """Compiles "decode" or "prefill"; several cells may do so at once."""
        subject, int32 = self.subject, functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
        if what == "decode":
            carry, keys, values = jax.eval_shape(self.start, subject.shapes)
            numbers = (int32((self.row["rows"],)), int32(()), int32(()))
            lowered = subject.programs.decode.lower(subject.shapes, carry, keys, values, *numbers)
        else:
            tokens = int32((self.prefill_rows, chunk_of(self.length - self.tokens)))
            state = subject.state(self.prefill_rows, self.length)
            lowered = subject.programs.prefill.lower(subject.shapes, state, tokens, tokens)
        self.compiled[what] = lowered.compile()

    def measure(self, what: str) -> None:
        """Measures "decode" or "prefill" into the row; what fails leaves its error there."""
        failed = self._try(what)
        gc.collect()
        if failed and self.row["asked"] == "largest" and what == "decode" and "RESOURCE_EXHAUSTED" in failed:
            self.row |= {"rows": in_eights(self.row["rows"] * 3 // 4), "attempts": 2}
            self.compiled.pop(what, None)
            failed = self._try(what)
        if failed:
            self.row[f"{what}_error"] = failed.splitlines()[0][:200]

    def _try(self, what: str) -> str | None:
        """Returns None, or the error, after which the arrays are free again."""
        try:
            if self.subject.params is None:
                self.subject.params = jax.block_until_ready(self.subject.make(jax.random.key(0)))
            if what not in self.compiled:
                self.compile(what)
            self.row |= self._decode() if what == "decode" else self._prefill()
        except (jax.errors.JaxRuntimeError, UserError) as error:
            return str(error)
        return None

    def start(self, params: Any) -> tuple[Any, jax.Array, dict[str, Any]]:
        """Returns what the loop takes: hidden vectors and state, random keys of the rows, numbers of the sampling."""
        rows, model = self.row["rows"], self.subject.model
        hidden = jnp.zeros((rows, self.subject.config.width), DTYPES[self.subject.config.dtype])
        state = model.bind(params).init_state(rows, self.length)
        return (hidden, state, None), jax.random.split(jax.random.key(0), rows), GREEDY.values(model.vocabulary)

    def _decode(self) -> dict[str, Any]:
        load, params, rows = timing.OtherLoad(), self.subject.params, self.row["rows"]
        carry, keys, values = jax.jit(self.start)(params)
        state = state_bytes(carry[1])
        left, seconds = np.full(rows, self.tokens, np.int32), []
        for piece in range(1 + self.pieces):
            begun = time.perf_counter()
            first, end = np.int32(piece * PIECE), np.int32(-1)
            carry, drawn, left = self.compiled["decode"](params, carry, keys, values, left, first, end)
            jax.block_until_ready(drawn)
            seconds.append((time.perf_counter() - begun) / PIECE)
        step = statistics.median(seconds[1:])
        result = {"state_bytes": state, "decode_tokens_per_second": rows / step, "step_seconds": step}
        result |= {"seconds": seconds, "others": load.cores()}
        chip = chip_of(jax.devices()[0].device_kind)
        if chip is not None:  # what the least traffic, weights and state read once, takes of the time
            result["bandwidth"] = (state + state_bytes(params)) / chip.bandwidth / step
        return result

    def _prefill(self) -> dict[str, Any]:
        model, shape = self.subject.model, (self.prefill_rows, self.length - self.tokens)
        prompts = np.random.default_rng(0).integers(0, model.vocabulary, shape)
        generation = Generation(model, self.subject.params, prompts, self.tokens, GREEDY)
        generation.programs = dataclasses.replace(generation.programs, prefill=self.compiled["prefill"])
        for _ in range(2):
            begun = time.perf_counter()
            jax.block_until_ready(generation.prefill())
            seconds = time.perf_counter() - begun
        return {"prefill_rows": self.prefill_rows, "prefill_tokens_per_second": prompts.size / seconds}

    def largest_batch(self) -> int:
        """Returns how many rows' states, and logits, fit beside the weights.

        Raises:
          UserError: none does, or the device does not give its memory.
        """
        # Logits and their exponentials, fp32, beside the state.
        row = state_bytes(self.subject.state(1, self.length)) + 3 * 4 * self.subject.model.vocabulary
        memory = jax.devices()[0].memory_stats() or {}
        if "bytes_limit" not in memory:
            raise UserError("--batches largest: this device does not give its memory; name numbers")
        free = memory["bytes_limit"] - memory["bytes_in_use"] - state_bytes(self.subject.shapes)
        rows = int(free * (1 - KEPT_FREE) / row)
        if rows < 1:
            raise UserError(f"the state of one row of {self.length} tokens does not fit the memory")
        return in_eights(rows)


def in_eights(rows: int) -> int:
    """Returns a number of rows in whole eights, which tensor cores take."""
    return max(rows // 8 * 8, min(rows, 7), 1)


def ratios(rows: list[dict]) -> list[str]:
    """Returns a line for every row beside full attention's at the same length and batch."""
    lines = []
    for row in rows:
        for other in rows:
            same = all(row.get(key) == other.get(key) for key in ("length", "asked"))
            if (
                other["attention"]
                and not row["attention"]
                and same
                and "step_seconds" in row
                and "step_seconds" in other
            ):
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


def _draw(rows: list[dict], path: Path) -> None:
    """Draws the rows, or says why not: a machine with a GPU may have no matplotlib."""
    try:
        decoding_by_context([row for row in rows if "step_seconds" in row], path)
    except (ImportError, NothingToPlot) as error:
        print(f"no plot: {error}")
    else:
        print(f"written: {path}")
