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
checkpoints are no part of it. MFU counts three times the forward products (training/monitoring/throughput.py), for the
peer too. The peer trains on one batch that lies on the device, so no data are in its time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from typing import Any

import chz
import jax

from recollect.benchmarks.machine import QUIET, OtherLoad
from recollect.benchmarks.peer_process import PeerProcess
from recollect.benchmarks.reporting import Parser, keep, print_device
from recollect.configuration import UserError, apply_overrides
from recollect.experiments import registry
from recollect.layers import Attention, GatedConvolution, LinearAttention, SlidingWindow
from recollect.layers.modules.positions import Rotary
from recollect.models.functional import count
from recollect.training.batches import make_feed
from recollect.training.monitoring.profiling import keep_compiled_programs
from recollect.training.monitoring.throughput import Meter, meter_of
from recollect.training.step import Program, member_values

ON_CPU = tuple(
    f"{pattern}_30m" for pattern in ("attention", "based", "window", "landmark", "mixture_of_heads", "hyena")
)
ON_ACCELERATORS = ("attention_360m", "based_360m")
WARM_UP = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Raises:
      UserError: an option that does not fit, an experiment that there is not, or a peer's interpreter that does not
        run.
    """
    options = _options(arguments)
    device = jax.devices()[0]
    names = options.models or (ON_ACCELERATORS if options.accelerator or device.platform != "cpu" else ON_CPU)
    experiments = [
        apply_overrides(registry.load(f"pretrain.{name.removeprefix('pretrain.')}", "experiment"), options.overrides)
        for name in names
    ]
    print_device()
    print(f"{'':32}{'parameters':>14}{'tokens/s':>12}{'s a step':>10}{'waiting':>9}{'MFU':>8}")
    rows = []
    for experiment in experiments:
        rows.append(measure(experiment, options.steps))
        print(_line(rows[-1]), flush=True)
        if options.peer_python:
            rows[-1]["peer"] = peer(experiment, options.peer_python, options.steps, rows[-1])
            print(_peer_line(rows[-1]), flush=True)
    if any(row["others"] > QUIET for row in rows):
        print("other programs ran meanwhile: NOT TO BE QUOTED")
    keep(options.out, "pretraining.json", "pretraining", arguments, {"rows": rows})
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("pretraining", __doc__)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="experiments of `pretrain`, for example based_360m")
    parser.add_argument(
        "--accelerator", action="store_true", help="what accelerators take by default, whatever the device"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument(
        "--peer-python",
        metavar="PYTHON",
        help="an interpreter with torch and flash-linear-attention: time those beside ours",
    )
    parser.add_out("pretraining.json")
    options, overrides = parser.parse_known_args(arguments)
    if any(one.startswith("-") or "=" not in one for one in overrides):
        raise UserError(f"bench pretraining: unrecognized arguments {' '.join(overrides)} (overrides are path=value)")
    if options.models is not None:  # overrides may follow the names
        overrides = [one for one in options.models if "=" in one] + overrides
        options.models = [one for one in options.models if "=" not in one]
    if options.steps < 1:
        raise UserError(f"bench pretraining: --steps {options.steps}: must be at least 1")
    options.overrides = overrides
    return options


def measure(experiment: Any, steps: int) -> dict[str, Any]:
    """Trains for `steps` timed steps, one a call: medians, and every step's seconds.

    Raises:
      UserError: the corpus or the devices asked for are not here.
    """
    keep_compiled_programs(experiment.run.compile_cache)
    experiment = chz.replace(experiment, run=chz.replace(experiment.run, steps_per_call=1))
    experiment.data.prepare()
    program = Program(experiment)
    feed = make_feed(experiment, program, None)
    values = member_values([experiment], False)
    state = program.init(experiment.run.seed)
    like = meter_of(experiment)
    meter, seconds, load = Meter(), [], OtherLoad()
    tokens = experiment.run.batch_size * experiment.data.length
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            meter, seconds, load = Meter(like.flops_per_token, like.peak), [], OtherLoad()
        begun, waited = time.perf_counter(), feed.waited
        state, metrics = feed.train(state, values, 1, step)
        loss = float(jax.device_get(metrics["loss"])[-1])
        seconds.append(time.perf_counter() - begun)
        meter.step(1, tokens, seconds[-1], feed.waited - waited)
    rates = meter.total()
    assert rates is not None
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
        "waiting_for_data": rates.waiting_for_data,
        "seconds": seconds,
        "loss": loss,
        "others": load.cores(),
    }
    if like.flops_per_token is not None and like.peak is not None:
        row |= {
            "mfu": tokens / median * like.flops_per_token / like.peak,
            "flops_per_token": like.flops_per_token,
            "peak": like.peak,
        }
    return row


def peer(experiment: Any, python: str, steps: int, ours: dict[str, Any]) -> dict[str, Any]:
    """The same shape in torch, in a process of its own: what pretraining_peer.py answers, or {"error"}.

    Raises:
      UserError: the interpreter cannot be run.
    """
    with contextlib.closing(PeerProcess("--peer-python", python, ["pretraining_peer.py"])) as process:
        answer = process.ask({**peer_case(experiment), "steps": steps})
    if "mfu" in ours and "tokens_per_second" in answer:
        answer["mfu"] = answer["tokens_per_second"] * ours["flops_per_token"] / ours["peak"]
    return answer


def peer_case(experiment: Any) -> dict[str, Any]:
    """What the peer needs to know: its layers and sizes.

    Raises:
      UserError: a mixer that the peer does not have.
    """
    kinds = {
        Attention: "attention",
        SlidingWindow: "window",
        GatedConvolution: "convolution",
        LinearAttention: "taylor",
    }
    layers = []
    for mixer in experiment.model.mixers:
        if type(mixer) not in kinds:
            raise UserError(
                f"{experiment.name}: the peer has no {type(mixer).__name__}; it has {', '.join(kinds.values())} layers"
            )
        found: dict[str, Any] = {"kind": kinds[type(mixer)]}
        for name in ("heads", "window", "feature_dim", "kernel", "expansion"):
            if getattr(mixer, name, None) is not None:
                found[name] = getattr(mixer, name)
        if isinstance(getattr(mixer, "positions", None), Rotary):
            found["rotary"] = mixer.positions.fraction
        layers.append(found)
    model, run = experiment.model, experiment.run
    sizes = {"width": model.width, "hidden": model.mlp.inner(model.width), "vocabulary": experiment.data.vocabulary}
    return {
        "layers": layers,
        **sizes,
        "rows": run.batch_size,
        "pieces": run.accumulate,
        "length": experiment.data.length,
        "optimizer": {
            name: getattr(experiment.optimizer, name, None)
            for name in ("learning_rate", "weight_decay", "beta1", "beta2", "clip")
        },
    }


def _line(row: dict[str, Any]) -> str:
    mfu = f"{row['mfu']:8.1%}" if "mfu" in row else f"{'-':>8}"
    rates = f"{row['tokens_per_second']:12,.0f}{row['step_seconds']:10.3f}{row['waiting_for_data']:9.2%}{mfu}"
    return f"{row['name']:32}{row['parameters']:14,}{rates}"


def _peer_line(row: dict[str, Any]) -> str:
    found = row["peer"]
    label = f"  {found.get('version', 'peer')}"
    if "error" in found:
        return f"{label:32} {found['error']}"
    mfu = f"{found['mfu']:8.1%}" if "mfu" in found else f"{'-':>8}"
    return (
        f"{label:32}{found['parameters']:14,}{found['tokens_per_second']:12,.0f}{found['step_seconds']:10.3f}"
        f"{'':9}{mfu}  "
        f"ours is {row['tokens_per_second'] / found['tokens_per_second']:.2f} times as fast"
    )
