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
import functools
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from recollect.benchmarks import kernel_case, peer_process, reporting, timing
from recollect.benchmarks.recurrence_sides import GATES

SHAPES = [(2, 1024, 4, 64), (1, 2048, 4, 128)]
SAME = 1e-5
SIDES = ("ours", "peer")
PARTS = ("forward", "both")


def _shape(text: str) -> tuple[int, ...]:
    numbers = tuple(int(number) if number.isdecimal() else 0 for number in text.split(","))
    if len(numbers) != 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not four sizes of at least 1, as 2,1024,4,64")
    return numbers


OPTIONS = {
    "cases": {"nargs": "+", "default": list(GATES), "metavar": "NAME", "help": f"of {', '.join(GATES)}"},
    "shapes": {
        "nargs": "+",
        "type": _shape,
        "default": SHAPES,
        "metavar": "B,T,H,D",
        "help": "default: " + " ".join(",".join(map(str, shape)) for shape in SHAPES),
    },
    "peer-python": {"metavar": "PYTHON", "help": "an interpreter with jax-linear-attention"},
    "same-python": {"action": "store_true", "help": "run ours in --peer-python too"},
    "turns": reporting.number(9, "of each side and part"),
    "seconds": reporting.number(0.3, "of a turn of one call or more"),
    "patience": reporting.number(300.0, "seconds to wait for an answer"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if outputs or gradients differ, or ours failed.

    Raises:
      UserError: an option that does not fit, or a peer's interpreter that does not run.
    """
    parser = reporting.Parser("recurrences", __doc__, OPTIONS, "recurrences.json")
    options = parser.parse(arguments, positive=("turns",), known={"cases": list(GATES)})
    if options.same_python and options.peer_python is None:
        parser.error("--same-python needs --peer-python")
    for name in ("seconds", "patience"):
        if not getattr(options, name) >= 0:
            parser.error(f"--{name} must be at least 0; got {getattr(options, name):g}")
    # Both sides share a GPU with this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    reporting.print_device()
    columns = " ".join(f"{'ours':>8} {'theirs':>8} {'times':>6} {'in CPU':>7}" for _ in PARTS)
    print(
        f"{'fp32, ms per call; times: theirs over ours':42} {'forward':>26} {'forward + backward':>32}\n"
        f"{'':36} {columns} {'o and gradients differ':>24}"
    )
    rows = [measure(case, shape, options) for shape in options.shapes for case in options.cases]
    for side in SIDES:
        versions = next((row[side]["versions"] for row in rows if "versions" in row.get(side, {})), {})
        if versions:
            print(f"{side}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    reporting.keep(options.out, "recurrences.json", "recurrences", arguments, {"rows": rows})
    return 1 if any(row["wrong"] or "error" in row["ours"] for row in rows) else 0


def measure(case: str, shape: tuple[int, ...], options: argparse.Namespace) -> dict:
    """Prints and returns the row of a case: how far the sides differ, and per side versions and times, or why there
    are none."""
    row: dict = {"case": case, "shape": list(shape), "wrong": [], "differs": {}}
    pythons = {"ours": options.peer_python if options.same_python else sys.executable, "peer": options.peer_python}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        np.savez(folder / "inputs.npz", **draw(case, shape))
        sides = {
            name: peer_process.PeerProcess("--peer-python", python, ["recurrence_sides.py", name], options.patience)
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
            load = timing.OtherLoad(tuple(side.process.pid for side in sides.values() if side.alive))
            _take_turns(row, sides, options.turns, options.seconds)
            if all(side.alive for side in sides.values()):
                row["cores_kept_busy_by_others"] = round(load.cores(), 2)
    _print(row)
    return row


def _take_turns(row: dict, sides: dict[str, peer_process.PeerProcess], turns: int, seconds: float) -> None:
    taken: dict[tuple[str, str], list[dict[str, float]]] = {(name, part): [] for name in sides for part in PARTS}
    for _, part, name in itertools.product(range(turns), PARTS, sides):
        if "error" not in row[name]:
            answer = sides[name].ask({"part": part, "seconds": seconds})
            taken[name, part].append(answer)
            row[name] |= {key: text for key, text in answer.items() if key == "error"}
    for (name, part), times in taken.items():
        if "error" not in row[name]:
            row[name][part] = {kind: statistics.median(time[kind] for time in times) for kind in ("clock", "cpu")}
            row[name][part]["turns"] = times


def draw(case: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns inputs and a cotangent, fp32: keys of unit length, gates as if trained: most decays are close to 1."""
    normal = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    arrays = {name: normal(shape) for name in ("q", "k", "v", "cotangent")}
    arrays["k"] = _unit(arrays["k"])
    for name, kind in GATES[case].items():
        x = normal(shape if kind == "channel" else shape[:3])
        arrays[name] = np.log(_sigmoid(x + 3)) if name == "g" else _sigmoid(x)
    if case == "rwkv7":
        arrays["g"] = -0.6065 * _sigmoid(normal(shape))
        removed = _unit(normal(shape))
        arrays |= {"a": -removed, "b": removed * arrays["b"]}
    return arrays


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _differences(ours, theirs) -> dict[str, float]:
    return {name: kernel_case.relative_error(theirs[name], ours[name]) for name in ours}


def _print(row: dict) -> None:
    print("{:18} b{} t{} h{} d{}".format(row["case"], *row["shape"]).ljust(36), _cells(row), flush=True)
    for side in SIDES:
        if "error" in row.get(side, {}):
            print(f"{'':4}{side}: {row[side]['error']}", flush=True)


def _cells(row: dict) -> str:
    differs = row["differs"]
    if row["wrong"]:
        return "DIFFER, not timed: " + ", ".join(f"{name} {differs[name]:.1e}" for name in row["wrong"])
    cells = []
    for part in PARTS:
        ours, theirs = (row.get(side, {}).get(part) for side in SIDES)
        cells += [f"{1e3 * times['clock']:8.2f}" if times else f"{'-':>8}" for times in (ours, theirs)]
        ratios = [f"{theirs[kind] / ours[kind]:.2f}" if ours and theirs else "-" for kind in ("clock", "cpu")]
        cells.append("{:>6} {:>7}".format(*ratios))
    if differs:
        cells.append(f"{differs['o']:12.1e} {max(error for name, error in differs.items() if name != 'o'):11.1e}")
    return " ".join(cells)
