"""Times recall training, side by side with Zoology when a checkout of it is given.

    python main.py bench recall
    python main.py bench recall --zoology PATH --zoology-python PYTHON --out

Both sides train the model of experiments/mqar.py: a convolution of width 3, then the mixer, 2 layers of width 64, no
MLP, no positions, embedding dropout 0.1, batches of 64 examples of 64 tokens in fp32, AdamW at 3e-3 with weight decay
0.1 on everything; vocabulary 256 with 8 pairs, and 8,192 with 4. They take turns, and a ratio compares turns that
follow each other, so that a change in the machine's load meets both.

Ours makes its batches inside the compiled step; there is no rate without data. Zoology makes a set beforehand and
repeats it every epoch: its rate is given without the data, and with its generator's time per example added, as if each
example were seen once. benchmarks/zoology_runner.py describes how Zoology is run at all.

What ours does not do: project positions without a label to the vocabulary (7 of 8 at 8 pairs). What Zoology does
beside: two more layer norms, which its blocks always have. Neither evaluates, logs to disk or writes checkpoints while
timed.

Easy to get wrong: PyTorch's threads wait for each other at every operation, so one other busy process can slow it
tenfold and ours twofold. So what other programs did is measured during each turn, and turns with other load are left
out.
"""

import dataclasses
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chz
import jax

from recollect.benchmarks.machine import QUIET, OtherLoad, describe_machine
from recollect.benchmarks.peer_process import PeerProcess
from recollect.benchmarks.recall_breakdown import breakdown, breakdown_table
from recollect.benchmarks.reporting import Parser, keep, number
from recollect.configuration import UserError
from recollect.data.synthetics import MQAR
from recollect.experiments.mqar import recall
from recollect.layers import Attention, LinearAttention
from recollect.layers.modules.feature_maps import Taylor
from recollect.models.functional import count
from recollect.training.step import member_values, program_for

SIZES = {"batch_size": 64, "length": 64, "width": 64}
BATCH, STEPS_PER_CALL = SIZES["batch_size"], 20
MIXERS = {"attention": Attention(), "based": LinearAttention(feature_dim=8, feature_map=Taylor())}
PAIRS = {256: 8, 8192: 4}
QUIET_TURNS = 3
"""Fewest turns without other load that a result is quoted from."""
AIMS = {256: 2.0, 8192: 4.0}
"""Examples per second, data included, as a multiple of Zoology's."""
OPTIONS = {
    "zoology": {"metavar": "PATH", "help": "a checkout of HazyResearch/zoology; without it, ours alone"},
    "zoology-python": {
        "metavar": "PYTHON",
        "default": sys.executable,
        "help": "an interpreter with PyTorch and what Zoology imports",
    },
    "mixers": {"nargs": "+", "choices": tuple(MIXERS), "default": list(MIXERS)},
    "vocabularies": {"nargs": "+", "type": int, "choices": tuple(PAIRS), "default": list(PAIRS)},
    "dropout": number(0.1, "of the embedding, both sides; Zoology's default is 0.1"),
    "rounds": number(7, "turns of each side"),
    "seconds": number(2.5, "of a turn"),
    "no-breakdown": {"action": "store_true", "help": "leave out where our step's time goes"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture at one vocabulary."""

    mixer: str
    vocabulary: int
    dropout: float

    @property
    def name(self) -> str:
        return f"conv+{self.mixer}, vocabulary {self.vocabulary:,}"

    def settings(self) -> dict[str, Any]:
        """Returns what Zoology's runner builds from."""
        task = {"mixer": self.mixer, "vocabulary": self.vocabulary, "pairs": PAIRS[self.vocabulary], **SIZES}
        return {**task, "embedding_dropout": self.dropout, "learning_rate": 3e-3, "weight_decay": 0.1}

    def experiment(self) -> Any:
        """Returns the same for this project."""
        experiment = recall(f"benchmark.{self.mixer}", MIXERS[self.mixer])
        return chz.replace(
            experiment,
            model=chz.replace(experiment.model, width=SIZES["width"], embedding_dropout=self.dropout),
            data=MQAR(vocab_size=self.vocabulary, length=SIZES["length"], pairs=PAIRS[self.vocabulary]),
            run=chz.replace(experiment.run, batch_size=BATCH, steps_per_call=STEPS_PER_CALL),
        )


class Ours:
    """This project's training program for one experiment."""

    def __init__(self, experiment: Any):
        self.program = program_for(experiment)
        self.inputs = member_values([experiment], False), STEPS_PER_CALL, experiment.data.train_slices()[0]
        self.state = self.program.init(0)
        self.parameters = count(self.state["params"])

    def turn(self, seconds: float) -> dict[str, float]:
        """Calls for about `seconds`, at least once; returns the median time of a step."""
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            self.state, _ = jax.block_until_ready(self.program.train(self.state, *self.inputs))
            times.append((time.perf_counter() - start) / STEPS_PER_CALL)
        return {"step": statistics.median(times)}


class Zoology:
    """Zoology's trainer in a process of its own.

    Raises:
      UserError: the process cannot start, or cannot import Zoology.
    """

    def __init__(self, checkout: str, python: str):
        if not (Path(checkout) / "zoology" / "train.py").exists():
            raise UserError(f"--zoology {checkout} is not a checkout of Zoology: it has no zoology/train.py")
        self.peer = PeerProcess("--zoology-python", python, ["zoology_runner.py", checkout])
        command = ["git", "--git-dir", f"{checkout}/.git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        self.facts = {**self.ask("facts"), "commit": commit or None}

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer.

        Raises:
          UserError: it is an error, or the process ended.
        """
        answer = self.peer.ask({"op": operation, **arguments})
        if "error" in answer:
            self.peer.close()
            raise UserError(f"Zoology cannot be run: {answer['error']}")
        return answer

    def build(self, settings: dict[str, Any]) -> None:
        """Makes a model, and measures about how long its step takes."""
        self.parameters = self.ask("build", case=settings)["parameters"]
        self.step_seconds = statistics.median(self.ask("train", steps=6)["step_seconds"][2:])

    def turn(self, seconds: float) -> dict[str, float]:
        """Trains for about `seconds`; returns the median time of a step, and that of making one batch of examples."""
        answer = self.ask("train", steps=max(4, round(seconds / self.step_seconds)))
        self.step_seconds = statistics.median(answer["step_seconds"])
        return {"step": self.step_seconds, "data": answer["data_seconds"] / answer["examples"] * BATCH}


def run_case(case: Case, zoology: Zoology | None, rounds: int, seconds: float) -> dict[str, Any]:
    """Returns the turns of both sides, and what they come to."""
    ours = Ours(case.experiment())
    for _ in range(2):
        ours.turn(0.0)  # compiles, for the first state and for those that follow
    if zoology is not None:
        zoology.build(case.settings())
    turns: list[dict[str, Any]] = []
    load = OtherLoad(() if zoology is None else (zoology.peer.process.pid,))
    for _ in range(rounds):
        turn = {"ours": ours.turn(seconds), "zoology": None if zoology is None else zoology.turn(seconds)}
        turns.append({**turn, "others": load.cores()})
    row = {"case": case.name, "mixer": case.mixer, "vocabulary": case.vocabulary, "parameters": ours.parameters}
    return row | summarise(turns) | ({} if zoology is None else {"zoology_parameters": zoology.parameters})


def summarise(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians over turns, in ms per step and examples per second, and ratios with their range: ours to
    Zoology's of the same turn.

    Turns during which other programs kept more than `QUIET` cores busy are left out; where that leaves fewer than
    `QUIET_TURNS`, all are taken, and "quotable" is False.
    """
    quiet = [turn for turn in turns if not turn["others"] > QUIET]
    quotable = len(quiet) >= QUIET_TURNS
    row: dict[str, Any] = {"turns": turns, "turns_used": len(quiet if quotable else turns), "quotable": quotable}
    turns = quiet if quotable else turns
    ours = [turn["ours"]["step"] for turn in turns]
    row |= {"ours_ms": 1e3 * statistics.median(ours), "ours_rate": BATCH / statistics.median(ours)}
    if turns[0]["zoology"] is None:
        return row
    alone = [turn["zoology"]["step"] for turn in turns]
    data = [turn["zoology"]["data"] for turn in turns]
    whole = [step + extra for step, extra in zip(alone, data, strict=True)]
    for name, theirs in (("with_data", whole), ("without_data", alone)):
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        row[f"zoology_{name}_ms"] = 1e3 * statistics.median(theirs)
        row[f"zoology_{name}_rate"] = BATCH / statistics.median(theirs)
        row[f"ratio_{name}"] = statistics.median(ratios)
        row[f"ratio_{name}_range"] = [min(ratios), max(ratios)]
    row["zoology_data_ms"] = 1e3 * statistics.median(data)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as text: ms per step and examples per second; ratios in examples per second, with their range."""
    lines = [f"{'':34}{'ms per step':>12}{'examples/s':>12}{'ratio':>8}   range over turns"]
    for row in rows:
        used = f"{row['turns_used']} of {len(row['turns'])} turns"
        lines.append(f"{row['case']} ({used if row['quotable'] else 'other programs ran: NOT TO BE QUOTED'})")
        lines.append(f"{'  ours, data included':34}{row['ours_ms']:12.2f}{row['ours_rate']:12,.0f}")
        if "ratio_with_data" not in row:
            continue
        for name, label in (("with_data", "data included"), ("without_data", "data made beforehand")):
            numbers = (
                f"{row[f'zoology_{name}_ms']:12.2f}{row[f'zoology_{name}_rate']:12,.0f}{row[f'ratio_{name}']:8.2f}"
            )
            low, high = row[f"ratio_{name}_range"]
            lines.append(f"{f'  Zoology, {label}':34}{numbers}   {low:.2f} to {high:.2f}")
        if row["quotable"]:
            aim = AIMS[row["vocabulary"]]
            lines.append(f"  aim {aim:g} times, data included: {'met' if row['ratio_with_data'] >= aim else 'missed'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Raises:
      UserError: an option that does not fit, or Zoology cannot be run.
    """
    parser = Parser("recall", __doc__, OPTIONS, "recall_training.json")
    options = parser.parse(arguments, positive=("rounds", "seconds"))
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout {options.dropout}: must be in [0, 1)")
    machine = describe_machine()
    print(f"{machine['cpu_model']}, {machine['cores']} cores, load {machine['load_average']:.2f}")
    zoology = None if options.zoology is None else Zoology(options.zoology, options.zoology_python)
    if zoology is not None:
        facts = zoology.facts
        versions = f"{facts['commit'] or '(commit unknown)'}, PyTorch {facts['versions']['torch']}"
        print(f"Zoology {versions}, {facts['threads']} threads")
        print("".join(f"  patched: {patch}\n" for patch in facts["patches"]), end="")
        print(f"  stand-ins for missing packages: {', '.join(facts['stubs']) or 'none'}")

    names = [(mixer, vocabulary) for vocabulary in options.vocabularies for mixer in options.mixers]
    cases = [Case(*name, options.dropout) for name in names]
    rows = [run_case(case, zoology, options.rounds, options.seconds) for case in cases]
    if zoology is not None:
        zoology.peer.close()
    print(table(rows))
    pieces, others = {}, 0.0
    if not options.no_breakdown:
        load = OtherLoad()
        pieces = {case.name: breakdown(case.experiment(), options.seconds / 4) for case in cases}
        print(breakdown_table(pieces))
        others = load.cores()
        if others > QUIET:
            print(f"meanwhile other programs kept {others:.2f} cores busy: these pieces are NOT TO BE QUOTED")
    facts = {
        "settings": {**vars(options), **SIZES, "steps_per_call": STEPS_PER_CALL},
        "zoology": None if zoology is None else zoology.facts,
        "cases": rows,
        "breakdown_ms": pieces,
        "breakdown_others_cores": others,
    }
    keep(options.out, "recall_training.json", "recall", arguments, facts)
    return 0
