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

import statistics
import subprocess
import sys
from pathlib import Path

import chz
import jax

from recollect.benchmarks import peer_process, recall_breakdown, reporting, timing
from recollect.configuration import UserError
from recollect.data.synthetics import MQAR
from recollect.experiments import recall
from recollect.layers import Attention, LinearAttention
from recollect.layers.modules import Taylor
from recollect.models import count
from recollect.training import Experiment, program_for

SIZES = {"batch_size": 64, "length": 64, "width": 64}
BATCH, STEPS_PER_CALL = SIZES["batch_size"], recall_breakdown.STEPS
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
    "dropout": reporting.number(0.1, "of the embedding, both sides; Zoology's default is 0.1"),
    "rounds": reporting.number(7, "turns of each side"),
    "seconds": reporting.number(2.5, "of a turn"),
    "no-breakdown": {"action": "store_true", "help": "leave out where our step's time goes"},
}


def case_of(mixer: str, vocabulary: int, dropout: float) -> dict:
    """Returns one architecture at one vocabulary, as Zoology's runner builds it, and its name."""
    return {
        "case": f"conv+{mixer}, vocabulary {vocabulary:,}",
        "mixer": mixer,
        "vocabulary": vocabulary,
        "pairs": PAIRS[vocabulary],
        **SIZES,
        "embedding_dropout": dropout,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
    }


def experiment_of(case: dict) -> Experiment:
    """Returns the same for this project."""
    experiment = recall(f"benchmark.{case['mixer']}", MIXERS[case["mixer"]])
    return chz.replace(
        experiment,
        model=chz.replace(experiment.model, width=case["width"], embedding_dropout=case["embedding_dropout"]),
        data=MQAR(vocab_size=case["vocabulary"], length=case["length"], pairs=case["pairs"]),
        run=chz.replace(experiment.run, batch_size=BATCH, steps_per_call=STEPS_PER_CALL),
    )


class Zoology:
    """Zoology's trainer in a process of its own.

    Raises:
      UserError: the process cannot start, or cannot import Zoology.
    """

    def __init__(self, checkout: str, python: str):
        if not (Path(checkout) / "zoology" / "train.py").exists():
            raise UserError(f"--zoology {checkout} is not a checkout of Zoology: it has no zoology/train.py")
        self.peer = peer_process.PeerProcess("--zoology-python", python, ["zoology_runner.py", checkout])
        command = ["git", "--git-dir", f"{checkout}/.git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        self.facts = {**self.ask("facts"), "commit": commit or None}

    def ask(self, operation: str, **arguments) -> dict:
        """Returns the answer.

        Raises:
          UserError: it is an error, or the process ended.
        """
        answer = self.peer.ask({"op": operation, **arguments})
        if "error" in answer:
            self.peer.close()
            raise UserError(f"Zoology cannot be run: {answer['error']}")
        return answer

    def build(self, case: dict) -> None:
        """Makes a model, and measures about how long its step takes."""
        self.parameters = self.ask("build", case=case)["parameters"]
        self.step_seconds = statistics.median(self.ask("train", steps=6)["step_seconds"][2:])

    def turn(self, seconds: float) -> dict[str, float]:
        """Trains for about `seconds`; returns the median time of a step, and that of making one batch of examples."""
        answer = self.ask("train", steps=max(4, round(seconds / self.step_seconds)))
        self.step_seconds = statistics.median(answer["step_seconds"])
        return {"step": self.step_seconds, "data": answer["data_seconds"] / answer["examples"] * BATCH}


def run_case(case: dict, zoology: Zoology | None, rounds: int, seconds: float) -> dict:
    """Returns the turns of both sides, and what they come to."""
    program = program_for(experiment_of(case))
    ours = {"step": recall_breakdown.whole_step(program)}
    timing.time_in_turns(ours, turns=1)  # compiles, for the first state and for those that follow
    if zoology is not None:
        zoology.build(case)
    load = timing.OtherLoad(() if zoology is None else (zoology.peer.process.pid,))
    turns = [
        {
            "ours": {"step": timing.time_in_turns(ours, 1, seconds, warm_up=False)["step"] / STEPS_PER_CALL},
            "zoology": None if zoology is None else zoology.turn(seconds),
            "others": load.cores(),
        }
        for _ in range(rounds)
    ]
    row = {name: case[name] for name in ("case", "mixer", "vocabulary")}
    row["parameters"] = count(jax.eval_shape(program.init, 0)["params"])
    return row | summarise(turns) | ({} if zoology is None else {"zoology_parameters": zoology.parameters})


def summarise(turns: list[dict]) -> dict:
    """Returns medians over turns, in ms per step and examples per second, and ratios with their range: ours to
    Zoology's of the same turn.

    Turns during which other programs kept more than `QUIET` cores busy are left out; where that leaves fewer than
    `QUIET_TURNS`, all are taken, and "quotable" is False.
    """
    quiet = [turn for turn in turns if not turn["others"] > timing.QUIET]
    quotable = len(quiet) >= QUIET_TURNS
    used = quiet if quotable else turns
    ours = [turn["ours"]["step"] for turn in used]
    row = {"turns": turns, "turns_used": len(used), "quotable": quotable, **_speed("ours", ours)}
    if turns[0]["zoology"] is None:
        return row
    alone, data = ([turn["zoology"][part] for turn in used] for part in ("step", "data"))
    for name, theirs in (("with_data", [sum(both) for both in zip(alone, data, strict=True)]), ("without_data", alone)):
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        row |= _speed(f"zoology_{name}", theirs) | {f"ratio_{name}": statistics.median(ratios)}
        row[f"ratio_{name}_range"] = [min(ratios), max(ratios)]
    return row | {"zoology_data_ms": 1e3 * statistics.median(data)}


def _speed(name: str, steps: list[float]) -> dict[str, float]:
    """Returns the median of seconds per step as milliseconds, and as examples per second."""
    median = statistics.median(steps)
    return {f"{name}_ms": 1e3 * median, f"{name}_rate": BATCH / median}


def table(rows: list[dict]) -> str:
    """Returns rows as text: ms per step and examples per second; ratios in examples per second, with their range."""
    lines = [f"{'':34}{'ms per step':>12}{'examples/s':>12}{'ratio':>8}   range over turns"]
    for row in rows:
        used = f"{row['turns_used']} of {len(row['turns'])} turns"
        lines.append(f"{row['case']} ({used if row['quotable'] else 'other programs ran: NOT TO BE QUOTED'})")
        lines.append(f"{'  ours, data included':34}{row['ours_ms']:12.2f}{row['ours_rate']:12,.0f}")
        for name, label in (("with_data", "data included"), ("without_data", "data made beforehand")):
            if f"ratio_{name}" in row:
                speed = f"{row[f'zoology_{name}_ms']:12.2f}{row[f'zoology_{name}_rate']:12,.0f}"
                ratio = "{:8.2f}   {:.2f} to {:.2f}".format(row[f"ratio_{name}"], *row[f"ratio_{name}_range"])
                lines.append(f"{f'  Zoology, {label}':34}{speed}{ratio}")
        if row["quotable"] and "ratio_with_data" in row:
            aim = AIMS[row["vocabulary"]]
            lines.append(f"  aim {aim:g} times, data included: {'met' if row['ratio_with_data'] >= aim else 'missed'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Raises:
      UserError: an option that does not fit, or Zoology cannot be run.
    """
    parser = reporting.Parser("recall", __doc__, OPTIONS, "recall_training.json")
    options = parser.parse(arguments, positive=("rounds", "seconds"))
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout {options.dropout}: must be in [0, 1)")
    machine = reporting.describe_machine()
    print(f"{machine['cpu_model']}, {machine['cores']} cores, load {machine['load_average']:.2f}")
    zoology = None if options.zoology is None else Zoology(options.zoology, options.zoology_python)
    if zoology is not None:
        facts = zoology.facts
        versions = f"{facts['commit'] or '(commit unknown)'}, PyTorch {facts['versions']['torch']}"
        print(
            f"Zoology {versions}, {facts['threads']} threads",
            *(f"  patched: {patch}" for patch in facts["patches"]),
            f"  stand-ins for missing packages: {', '.join(facts['stubs']) or 'none'}",
            sep="\n",
        )

    cases = [case_of(mixer, size, options.dropout) for size in options.vocabularies for mixer in options.mixers]
    rows = [run_case(case, zoology, options.rounds, options.seconds) for case in cases]
    if zoology is not None:
        zoology.peer.close()
    print(table(rows))
    pieces, others = {}, 0.0
    if not options.no_breakdown:
        load = timing.OtherLoad()
        pieces = {case["case"]: recall_breakdown.breakdown(experiment_of(case), options.seconds / 4) for case in cases}
        print(recall_breakdown.breakdown_table(pieces))
        others = load.cores()
        if others > timing.QUIET:
            print(f"meanwhile other programs kept {others:.2f} cores busy: these pieces are NOT TO BE QUOTED")
    facts = {
        "settings": {**vars(options), **SIZES, "steps_per_call": STEPS_PER_CALL},
        "zoology": None if zoology is None else zoology.facts,
        "cases": rows,
        "breakdown_ms": pieces,
        "breakdown_others_cores": others,
    }
    reporting.keep(options.out, "recall_training.json", "recall", arguments, facts)
    return 0
