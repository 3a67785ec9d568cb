"""Trains one small model on rows made by concatenate-and-chunk and by Dataset Decomposition: time per step, and
time to a held-out loss.

    python main.py bench decomposition                  # the standard library, length 4,096, 12 minutes of training
    python main.py bench decomposition --out            # also writes benchmarks/results/DEVICE/decomposition.json
    python main.py bench decomposition --length 1024 --shortest 64 --minutes 5

Both see the same documents, take the same number of tokens per step, start from the same parameters, use rotary
positions of base 100,000 and, in chunked rows, a mask that keeps documents apart (as Pouransari et al., arXiv
2405.13226, compare them). The learning rate is constant after its warm-up, so that a loss reached at some moment does
not depend on how long the run was to be. They train in turns of a few steps, so that whatever else the machine does
meets both, and are evaluated after each turn on the same packed held-out rows. Seconds are of training alone: reading
data is in them, compiling and evaluating are not. A loss that lies between two evaluations is taken to fall in a
straight line.
"""

import math
import statistics
import time
from argparse import Namespace

import chz
import jax
import numpy as np

from recollect.benchmarks import reporting, timing
from recollect.data.text import Text
from recollect.data.text.rows import Chunked, Decomposed
from recollect.data.text.rows.base import read_rows
from recollect.layers import Attention
from recollect.layers.modules import Rotary, SwiGLU
from recollect.models import LanguageModel, count, repeat
from recollect.training import AdamW, Experiment, Run, batches, evaluator, host_batches, member_values, program_for

ABOVE = (1.0, 0.5, 0.25, 0.1, 0.0)
NAMES = ("chunked", "decomposed")
ENDLESS = 1_000_000
CURRICULA = ("uniform", "grow_linear", "grow_p2", "grow_p100")
OPTIONS = {
    "length": reporting.number(4096, "tokens of a chunked row and of the longest bucket, a power of two"),
    "shortest": reporting.number(256, "tokens of the shortest bucket, a power of two"),
    "batch": reporting.number(1, "rows of `length` tokens per step"),
    "width": reporting.number(128, "of the model"),
    "depth": reporting.number(2, "layers"),
    "heads": reporting.number(4, "attention heads"),
    "steps": reporting.number(ENDLESS, "most steps of each"),
    "turn": reporting.number(20, "steps between evaluations"),
    "cycle": reporting.number(40, "steps after which the curriculum starts again"),
    "held-out": reporting.number(8, "rows whose bytes of held-out text an evaluation measures"),
    "minutes": reporting.number(12.0, "of training both together, after compiling"),
    "learning-rate": reporting.number(2e-3, "of AdamW after its warm-up"),
}
MORE_OPTIONS = {
    "seed": reporting.number(0, "of parameters and data"),
    "curriculum": {"default": "grow_p2", "choices": CURRICULA},
    "source": {"default": "stdlib", "help": "as data.source"},
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Raises:
      UserError: an option that does not fit.
    """
    parser = reporting.Parser("decomposition", __doc__, OPTIONS | MORE_OPTIONS, "decomposition.json")
    options = parser.parse(arguments, positive=[name.replace("-", "_") for name in OPTIONS])
    reporting.print_device()
    load = timing.OtherLoad()
    experiments = {name: experiment_of(name, options) for name in NAMES}  # refuses before anything is compiled
    trainees = [_Trainee(name, experiment, options) for name, experiment in experiments.items()]
    print(f"{trainees[0].parameters:,} parameters, {options.length * options.batch:,} tokens per step")
    _train(trainees, options)
    result = {trainee.name: trainee.result() for trainee in trainees}
    reached = times_to_losses(result["chunked"]["curve"], result["decomposed"]["curve"])
    _print(result, reached)
    facts = {
        "cores_kept_busy_by_others": round(load.cores(), 2),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "parameters": trainees[0].parameters,
        **result,
        "times_to_losses": reached,
    }
    reporting.keep(options.out, "decomposition.json", "decomposition", arguments, facts)
    return 0


def experiment_of(name: str, options: Namespace) -> Experiment:
    """Returns the experiment that trains on rows made in the way called `name`."""
    held_out = options.held_out * options.length  # of a byte model
    data = Text(source=options.source, length=options.length, sequences=Chunked(), held_out_bytes=held_out)
    if name == "decomposed":
        rows = Decomposed(shortest=options.shortest, curriculum=options.curriculum, cycles=1)
        plan = chz.replace(data, sequences=rows).batches(options.seed, options.batch).plan
        steps = np.dot(plan.lengths, plan.counts) / (options.length * options.batch)
        data = chz.replace(data, sequences=chz.replace(rows, cycles=max(1, round(steps / options.cycle))))
    return Experiment(
        name=f"decomposition.{name}",
        model=LanguageModel(
            width=options.width,
            stages=repeat(
                Attention(heads=options.heads, positions=Rotary(base=100_000.0), query_key_norm=True),
                depth=options.depth,
            ),
            mlp=SwiGLU(),
        ),
        data=data,
        optimizer=AdamW(
            learning_rate=options.learning_rate, beta2=0.95, weight_decay=0.1, warmup=20, clip=1.0, schedule="constant"
        ),
        run=Run(steps=ENDLESS, batch_size=options.batch, steps_per_call=1, precision="default", seed=options.seed),
    )


class _Trainee:
    """One of the two: its state, and what was measured."""

    def __init__(self, name: str, experiment: Experiment, options: Namespace):
        self.name, self.experiment = name, experiment
        self.program = program_for(self.experiment)
        self.feed = batches.open_batches(self.experiment, self.program)
        self.state = self.program.init(options.seed)
        self.values = member_values([self.experiment], False)
        self.parameters = count(self.state["params"])
        self.tokens = options.batch * options.length
        self.step, self.seconds = 0, 0.0
        self.times: dict[int, list[float]] = {length: [] for length in self.feed.batches.row_lengths}
        self.curve: list[dict[str, float]] = []
        # Compiles the step of each length and the evaluation; nothing that this trains is kept.
        for length in self.times:
            source, rows = self.feed.batches, self.tokens // length
            batch = read_rows(source.documents, (), rows, length, segmented=source.plan.segmented)
            stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], batch)
            spare = jax.tree.map(lambda leaf: leaf.copy(), self.state)
            jax.block_until_ready(host_batches.train_on(self.program, spare, self.values, stacked))
        self.evaluate()
        self.feed.waited = 0.0

    def turn(self, steps: int) -> None:
        """Trains for `steps` steps, each timed, and evaluates."""
        for _ in range(steps):
            length = self.feed.batches.row_length(self.step)
            begun = time.perf_counter()
            self.state, _ = jax.block_until_ready(self.feed.train(self.state, self.values, 1, self.step))
            self.times[length].append(time.perf_counter() - begun)
            self.seconds += self.times[length][-1]
            self.step += 1
        self.evaluate()

    def evaluate(self) -> None:
        """Adds a point to the curve."""
        bits = evaluator.evaluate(self.program, self.state["params"], self.experiment.run.seed)["bits_per_byte"]
        self.curve.append({"step": self.step, "seconds": self.seconds, "bits_per_byte": bits})

    def result(self) -> dict:
        """Returns what is written of it."""
        return {
            "steps": self.step,
            "tokens": self.step * self.tokens,
            "seconds": self.seconds,
            "share_waiting_for_data": self.feed.waited / max(self.seconds, 1e-9),
            "by_length": {
                str(length): {"steps": len(times), "seconds_a_step": statistics.median(times) if times else None}
                for length, times in self.times.items()
            },
            "rows": self.feed.batches.plan.facts(),
            "curve": self.curve,
        }


def _train(trainees: list[_Trainee], options: Namespace) -> None:
    """Trains in turns until the steps or the minutes are used up; no fewer than one."""
    begun = time.perf_counter()
    print(f"{'step':>6} " + " ".join(f"{trainee.name + ': seconds, bits per byte':>34}" for trainee in trainees))
    while (step := trainees[0].step) < options.steps:
        if step > 0 and time.perf_counter() - begun > 60 * options.minutes:
            break
        for trainee in trainees:
            trainee.turn(min(options.turn, options.steps - step))
        cells = (f"{trainee.seconds:25.1f} {trainee.curve[-1]['bits_per_byte']:8.3f}" for trainee in trainees)
        print(f"{trainees[0].step:6} " + " ".join(cells), flush=True)


def time_to(curve: list[dict[str, float]], bits: float) -> float | None:
    """Returns the seconds of training until the held-out loss first was `bits`; None where it never was so low."""
    for before, after in zip([curve[0], *curve[:-1]], curve, strict=True):
        if after["bits_per_byte"] <= bits:
            fall = before["bits_per_byte"] - after["bits_per_byte"]
            share = (before["bits_per_byte"] - bits) / fall if fall > 0 else 1.0
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return None


def times_to_losses(one: list[dict[str, float]], two: list[dict[str, float]]) -> list[dict[str, float]]:
    """Returns seconds of both to losses that both reached: the lowest (rounded up to 0.05), and some above it."""
    lowest = math.ceil(20 * max(min(point["bits_per_byte"] for point in curve) for curve in (one, two)) - 1e-9) / 20
    losses = sorted({round(lowest + above, 2) for above in ABOVE}, reverse=True)
    times = ((bits, time_to(one, bits), time_to(two, bits)) for bits in losses)
    return [
        {"bits_per_byte": bits, "chunked": chunked, "decomposed": decomposed, "ratio": chunked / decomposed}
        for bits, chunked, decomposed in times
        if chunked and decomposed
    ]


def _print(result: dict, reached: list[dict[str, float]]) -> None:
    for name, facts in result.items():
        print(
            f"{name}: {facts['steps']} steps, {facts['tokens']:,} tokens in {facts['seconds']:.1f} s, "
            f"{facts['tokens'] / facts['seconds']:,.0f} per second, {100 * facts['share_waiting_for_data']:.2f}% of it "
            f"waiting for data, {facts['curve'][-1]['bits_per_byte']:.3f} bits per byte"
        )
    print("tokens per row, steps, ms per step:")
    for name, facts in result.items():
        for length, row in facts["by_length"].items():
            took = f"{1e3 * row['seconds_a_step']:10.1f}" if row["steps"] else "not taken"
            print(f"  {name:12} {length:>6} {row['steps']:6} {took}")
    rows = result["decomposed"]["rows"]
    kept = f"{rows['retained_share']:.1%} of all tokens, {rows['target_share']:.1%} of all targets"
    print(f"kept by decomposition: {kept}")
    print("seconds to a held-out loss: bits per byte, chunked, decomposed, chunked / decomposed")
    for row in reached:
        print(f"  {row['bits_per_byte']:6.2f} {row['chunked']:8.1f} {row['decomposed']:8.1f} {row['ratio']:6.2f}")
    if not reached:
        print("  none that both reached")
