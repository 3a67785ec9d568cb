"""Times this project's recurrences beside jax-linear-attention's plain-JAX forms, in turns, and compares results.

    python main.py bench recurrences                              # ours alone
    python main.py bench recurrences --peer-python PYTHON --out   # PYTHON (3.12) has jax-linear-attention
    python main.py bench recurrences --peer-python PYTHON --same-python     # ours runs in PYTHON too: one jax for both

Both are fp32, take the same arrays and run in a process of their own per case, on whatever device jax finds there: ours
on backend "xla", theirs as impl="chunked". Outputs, and gradients for one cotangent, are compared before anything is
timed (root mean square of the difference over that of ours; above 1e-5 the row is wrong and not timed). Then they take
turns: ours, theirs, ours, ...; times are medians of turns, by the clock and of the processes' CPU time, which other
programs on the machine distort less. A side that fails, dies or takes longer than --patience seconds for an answer is
reported in its row, and the other rows and the other side go on.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from recollect.benchmarks.machine import OtherLoad
from recollect.benchmarks.peer_process import PeerProcess
from recollect.benchmarks.recurrence_sides import GATES
from recollect.benchmarks.reporting import Parser, keep, number, print_device

SHAPES = [(2, 1024, 4, 64), (1, 2048, 4, 128)]
SAME = 1e-5
SIDES = ("ours", "peer")
PARTS = ("forward", "both")


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if outputs or gradients differ, or ours failed.

    Raises:
      UserError: an option that does not fit, or a peer's interpreter that does not run.
    """
    shapes = "default: " + " ".join(",".join(map(str, shape)) for shape in SHAPES)
    table = {
        "cases": {"nargs": "+", "default": list(GATES), "metavar": "NAME", "help": f"of {', '.join(GATES)}"},
        "shapes": {"nargs": "+", "type": _shape, "default": SHAPES, "metavar": "B,T,H,D", "help": shapes},
        "peer-python": {"metavar": "PYTHON", "help": "an interpreter with jax-linear-attention"},
        "same-python": {"action": "store_true", "help": "run ours in --peer-python too"},
        "turns": number(9, "of each side and part"),
        "seconds": number(0.3, "of a turn of one call or more"),
        "patience": number(300.0, "seconds to wait for an answer"),
    }
    parser = Parser("recurrences", __doc__, table, "recurrences.json")
    options = parser.parse(arguments, positive=("turns",), known={"cases": list(GATES)})
    if options.same_python and options.peer_python is None:
        parser.error("--same-python needs --peer-python")
    for name in ("seconds", "patience"):
        if not getattr(options, name) >= 0:
            parser.error(f"--{name} must be at least 0; got {getattr(options, name):g}")
    # Both sides share a GPU with this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print_device()
    columns = " ".join(f"{'ours':>8} {'theirs':>8} {'times':>6} {'in CPU':>7}" for _ in PARTS)
    print(f"{'fp32, ms per call; times: theirs over ours':42} {'forward':>26} {'forward + backward':>32}")
    print(f"{'':36} {columns} {'o and gradients differ':>24}")
    rows = []
    for shape in options.shapes:
        for case in options.cases:
            rows.append(measure(case, shape, options))
            _print(rows[-1])
    for side in SIDES:
        versions = next((row[side]["versions"] for row in rows if "versions" in row.get(side, {})), {})
        if versions:
            print(f"{side}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    keep(options.out, "recurrences.json", "recurrences", arguments, {"rows": rows})
    return 1 if any(row["wrong"] or "error" in row["ours"] for row in rows) else 0


def _shape(text: str) -> tuple[int, ...]:
    numbers = tuple(int(number) if number.isdecimal() else 0 for number in text.split(","))
    if len(numbers) != 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not four sizes of at least 1, as 2,1024,4,64")
    return numbers


def measure(case: str, shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of a case: how far the sides differ, and per side versions and times, or why there are none."""
    row: dict[str, Any] = {"case": case, "shape": list(shape), "wrong": [], "differs": {}}
    pythons = {"ours": options.peer_python if options.same_python else sys.executable, "peer": options.peer_python}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        np.savez(folder / "inputs.npz", **draw(case, shape))  # type: ignore[arg-type]
        sides = {
            name: PeerProcess("--peer-python", python, ["recurrence_sides.py", name], options.patience)
            for name, python in pythons.items()
            if python is not None
        }
        for name, side in sides.items():
            stack.callback(side.close)
            outputs = str(folder / f"{name}.npz")
            row[name] = side.ask({"case": case, "inputs": str(folder / "inputs.npz"), "outputs": outputs})
        if len(sides) == 2 and not any("error" in row[name] for name in sides):
            row["differs"] = _differences(*(np.load(folder / f"{name}.npz") for name in SIDES))
            row["wrong"] = [name for name, error in row["differs"].items() if not error <= SAME]
        if not row["wrong"]:
            load = OtherLoad(tuple(side.process.pid for side in sides.values() if side.alive))
            _take_turns(row, sides, options.turns, options.seconds)
            if all(side.alive for side in sides.values()):
                row["cores_kept_busy_by_others"] = round(load.cores(), 2)
    return row


def _take_turns(row: dict[str, Any], sides: dict[str, PeerProcess], turns: int, seconds: float) -> None:
    taken: dict[tuple[str, str], list[dict[str, float]]] = {(name, part): [] for name in sides for part in PARTS}
    for _, (name, part) in itertools.product(range(turns), ((name, part) for part in PARTS for name in sides)):
        if "error" not in row[name]:
            answer = sides[name].ask({"part": part, "seconds": seconds})
            taken[name, part].append(answer)
            row[name] |= {key: text for key, text in answer.items() if key == "error"}
    for (name, part), times in taken.items():
        if "error" not in row[name]:
            medians = {kind: statistics.median(time[kind] for time in times) for kind in ("clock", "cpu")}
            row[name][part] = medians | {"turns": times}


def draw(case: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns inputs and a cotangent, fp32: keys of unit length, gates as if trained: most decays are close to 1."""
    b, t, h, d = shape
    random = np.random.default_rng(0)
    normal = lambda *sizes: random.standard_normal(sizes, np.float32)  # noqa: E731
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    arrays = {name: normal(b, t, h, d) for name in ("q", "k", "v", "cotangent")}
    arrays["k"] = unit(arrays["k"])
    for name, kind in GATES[case].items():
        x = normal(b, t, h, d) if kind == "channel" else normal(b, t, h)
        arrays[name] = np.log(sigmoid(x + 3)) if name == "g" else sigmoid(x)
    if case == "rwkv7":
        arrays["g"] = -0.6065 * sigmoid(normal(b, t, h, d))
        removed = unit(normal(b, t, h, d))
        arrays |= {"a": -removed, "b": removed * arrays["b"]}
    return arrays


def _differences(ours: Any, theirs: Any) -> dict[str, float]:
    size = lambda x: float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))  # noqa: E731
    return {name: size(ours[name].astype(np.float64) - theirs[name]) / max(size(ours[name]), 1e-30) for name in ours}


def _print(row: dict[str, Any]) -> None:
    b, t, h, d = row["shape"]
    label = f"{row['case']:18} b{b} t{t} h{h} d{d}"
    print(f"{label:36} {_cells(row)}", flush=True)
    for side in SIDES:
        if "error" in row.get(side, {}):
            print(f"{'':4}{side}: {row[side]['error']}", flush=True)


def _cells(row: dict[str, Any]) -> str:
    differs = row["differs"]
    if row["wrong"]:
        return "DIFFER, not timed: " + ", ".join(f"{name} {differs[name]:.1e}" for name in row["wrong"])
    cells = []
    for part in PARTS:
        ours, theirs = (row.get(side, {}).get(part) for side in SIDES)
        cells += [f"{1e3 * times['clock']:8.2f}" if times else f"{'-':>8}" for times in (ours, theirs)]
        for kind, width in (("clock", 6), ("cpu", 7)):
            cells.append(f"{theirs[kind] / ours[kind]:{width}.2f}" if ours and theirs else f"{'-':>{width}}")
    if differs:
        cells.append(f"{differs['o']:12.1e} {max(error for name, error in differs.items() if name != 'o'):11.1e}")
    return " ".join(cells)
