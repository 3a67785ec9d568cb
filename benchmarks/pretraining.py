"""Times pretraining as it runs, data included: tokens per second, and on devices whose peak is known MFU, beside torch
with flash-linear-attention.

    python main.py bench pretraining         # on a CPU: every pretrain.*_30m; else attention_360m and based_360m
    python main.py bench pretraining --out   # also writes benchmarks/results/DEVICE/pretraining.json
    python main.py bench pretraining --models based_125m --steps 10 data.source=FOLDER run.accumulate=4

On an H100 this one command times both 360M models at length 2,048 and, in turn, torch models of the same shapes (PYTHON
is one that has torch and flash-linear-attention; see benchmarks/pretraining_peer.py):

    python main.py bench pretraining --peer-python PYTHON --out

A step is what training does: rows read and packed by the data pipeline, gradients in `run.accumulate` pieces, clipping
and the optimizer. The median over `--steps` steps is reported, after two that compile and warm up; evaluation and
checkpoints are no part of it. MFU counts three times the forward products (training/monitoring/run_log.py), for the
peer too. The peer trains on one batch that lies on the device, so no data are in its time.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import chz
import jax
import numpy as np

from recollect.benchmarks import peer_process, reporting, timing
from recollect.configuration import UserError, apply_overrides, machine
from recollect.experiments import registry
from recollect.layers import Attention, GatedConvolution, LinearAttention, SlidingWindow
from recollect.layers.modules import Rotary
from recollect.models import count
from recollect.training import Experiment, Program, batches, member_values
from recollect.training.monitoring.run_log import Meter, meter_of

ON_CPU = tuple(f"{name}_30m" for name in ("attention", "based", "window", "landmark", "mixture_of_heads", "hyena"))
ON_ACCELERATORS = ("attention_360m", "based_360m")
WARM_UP = 2
KINDS = {Attention: "attention", SlidingWindow: "window", GatedConvolution: "convolution", LinearAttention: "taylor"}
"""Mixers that the peer has, and its names for them."""
MIXER_FIELDS = ("heads", "window", "feature_dim", "kernel", "expansion")
OPTIMIZER_FIELDS = ("learning_rate", "weight_decay", "beta1", "beta2", "clip")
OPTIONS = {
    "models": {"nargs": "+", "metavar": "NAME", "help": "experiments of `pretrain`, for example based_360m"},
    "accelerator": {"action": "store_true", "help": "what accelerators take by default, whatever the device"},
    "steps": reporting.number(5, "timed steps"),
    "peer-python": {
        "metavar": "PYTHON",
        "help": "an interpreter with torch and flash-linear-attention: time those beside ours",
    },
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Raises:
      UserError: an option that does not fit, an experiment that there is not, or a peer's interpreter that does not
        run.
    """
    options = _options(arguments)
    on_accelerator = options.accelerator or jax.default_backend() != "cpu"
    names = [
        f"pretrain.{name.removeprefix('pretrain.')}"
        for name in options.models or (ON_ACCELERATORS if on_accelerator else ON_CPU)
    ]
    experiments = [apply_overrides(registry.load(name, "experiment"), options.overrides) for name in names]
    reporting.print_device()
    print(f"{'':32}{'parameters':>14}{'tokens/s':>12}{'s/step':>10}{'waiting':>9}{'MFU':>8}")
    rows = []
    for experiment in experiments:
        row = measure(experiment, options.steps)
        rows.append(row)
        print(f"{row['name']:32}{_rates(row)}", flush=True)
        if options.peer_python:
            row["peer"] = peer(experiment, options.peer_python, options.steps, row)
            print(_peer_line(row), flush=True)
    if any(row["others"] > timing.QUIET for row in rows):
        print("other programs ran meanwhile: NOT TO BE QUOTED")
    reporting.keep(options.out, "pretraining.json", "pretraining", arguments, {"rows": rows})
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = reporting.Parser("pretraining", __doc__, OPTIONS, "pretraining.json")
    options, overrides = parser.parse_known_args(arguments)
    if any(one.startswith("-") or "=" not in one for one in overrides):
        raise UserError(f"bench pretraining: unrecognized arguments {' '.join(overrides)} (overrides are path=value)")
    if options.steps < 1:
        raise UserError(f"bench pretraining: --steps {options.steps}: must be at least 1")
    named = options.models or []  # overrides may follow the names
    options.models = [one for one in named if "=" not in one]
    options.overrides = [one for one in named if "=" in one] + overrides
    return options


def measure(experiment: Experiment, steps: int, turn: Callable[[], None] | None = None) -> dict:
    """Trains for `steps` timed steps, one per call: medians, and every step's seconds.

    Args:
      turn: called once the step is compiled, before any array is made: it returns when this process has the device to
        itself.

    Raises:
      UserError: the corpus or the devices asked for are not here.
    """
    machine.keep_compiled_programs(experiment.run.compile_cache)
    experiment = chz.replace(experiment, run=chz.replace(experiment.run, steps_per_call=1))
    experiment.data.prepare()
    program, values = _CompiledAhead(experiment), member_values([experiment], False)
    if turn is not None:
        shapes = jax.eval_shape(program.init, jax.ShapeDtypeStruct((), np.uint32))
        batches.open_batches(experiment, program).train(shapes, values, 1, 0)
        turn()
    feed, state = batches.open_batches(experiment, program), program.init(experiment.run.seed)
    like = meter_of(experiment)
    tokens = experiment.run.batch_size * experiment.data.length
    for step in range(WARM_UP + steps):
        if step in (0, WARM_UP):
            meter, seconds, load = Meter(like.flops_per_token, like.peak), [], timing.OtherLoad()
        begun, waited = time.perf_counter(), feed.waited
        state, metrics = feed.train(state, values, 1, step)
        loss = float(jax.device_get(metrics["loss"])[-1])
        seconds.append(time.perf_counter() - begun)
        meter.step(1, tokens, seconds[-1], feed.waited - waited)
    median = statistics.median(seconds)
    row = {
        "name": experiment.name,
        "parameters": count(state["params"]),
        "vocabulary": experiment.data.vocabulary,
        "rows": experiment.run.batch_size,
        "length": experiment.data.length,
        "pieces": experiment.run.accumulate,
        "dtype": experiment.model.dtype,
        "remat": experiment.model.remat,
        "tokens_per_second": tokens / median,
        "step_seconds": median,
        "waiting_for_data": meter.total().waiting_for_data,
        "seconds": seconds,
        "loss": loss,
        "others": load.cores(),
    }
    memory = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:  # GPUs and TPUs count it
        row["peak_bytes"] = memory["peak_bytes_in_use"]
    if like.flops_per_token is not None and like.peak is not None:
        mfu = tokens / median * like.flops_per_token / like.peak
        row |= {"mfu": mfu, "flops_per_token": like.flops_per_token, "peak": like.peak}
    return row


class _CompiledAhead(Program):
    """A program that a call with shapes only compiles, without the memory that a run needs; calls with arrays follow
    it."""

    def jit(self, key: Any, function: Any, **options: Any) -> Any:
        run = super().jit(key, function, **options)

        def call(*arguments: Any) -> Any:
            if not isinstance(jax.tree.leaves(arguments)[0], jax.ShapeDtypeStruct):
                return run(*arguments)
            with self.context():
                self._compiled[key] = self._compiled[key].lower(*arguments).compile()

        return call


def peer(experiment: Experiment, python: str, steps: int, ours: dict) -> dict:
    """Returns what pretraining_peer.py answers for the same shape, in a process of its own, or {"error"}.

    Raises:
      UserError: the interpreter cannot be run.
    """
    with contextlib.closing(peer_process.PeerProcess("--peer-python", python, ["pretraining_peer.py"])) as process:
        answer = process.ask({**peer_case(experiment), "steps": steps})
    if "mfu" in ours and "tokens_per_second" in answer:
        answer["mfu"] = answer["tokens_per_second"] * ours["flops_per_token"] / ours["peak"]
    return answer


def peer_case(experiment: Experiment) -> dict:
    """Returns what the peer needs to know: its layers and sizes.

    Raises:
      UserError: a mixer that the peer does not have.
    """
    layers = []
    for mixer in experiment.model.mixers:
        if type(mixer) not in KINDS:
            mistake = f"the peer has no {type(mixer).__name__}; it has {', '.join(KINDS.values())} layers"
            raise UserError(f"{experiment.name}: {mistake}")
        fields = {name: getattr(mixer, name, None) for name in MIXER_FIELDS}
        layer = {"kind": KINDS[type(mixer)], **{name: x for name, x in fields.items() if x is not None}}
        if isinstance(getattr(mixer, "positions", None), Rotary):
            layer["rotary"] = mixer.positions.fraction
        layers.append(layer)
    return {
        "layers": layers,
        "width": experiment.model.width,
        "hidden": experiment.model.mlp.inner(experiment.model.width),
        "vocabulary": experiment.data.vocabulary,
        "rows": experiment.run.batch_size,
        "pieces": experiment.run.accumulate,
        "length": experiment.data.length,
        "optimizer": {name: getattr(experiment.optimizer, name, None) for name in OPTIMIZER_FIELDS},
    }


def _peer_line(row: dict) -> str:
    peer = row["peer"]
    label = f"  {peer.get('version', 'peer')}"
    if "error" in peer:
        return f"{label:32} {peer['error']}"
    times = row["tokens_per_second"] / peer["tokens_per_second"]
    return f"{label:32}{_rates(peer)}  ours is {times:.2f} times as fast"


def _rates(row: dict) -> str:
    waiting = f"{row['waiting_for_data']:.2%}" if "waiting_for_data" in row else ""
    mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
    speed = f"{row['tokens_per_second']:12,.0f}{row['step_seconds']:10.3f}"
    return f"{row['parameters']:14,}{speed}{waiting:>9}{mfu:>8}"
