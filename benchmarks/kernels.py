"""Times every kernel operation on every backend that serves it here, beside plain jnp and, on a GPU,
flash-linear-attention and torch.

    python main.py bench kernels                              # on whatever device jax finds
    python main.py bench kernels --out                        # also writes benchmarks/results/DEVICE/kernels.json
    python main.py bench kernels --peer-python PYTHON --out   # PYTHON has torch and flash-linear-attention
    python main.py bench kernels --lengths                    # time and memory of xla at 1k to 64k tokens

Before a backend is timed at a shape, its outputs and gradients at the same head sizes (one row, two heads, 320 tokens)
are compared on this device with the reference in fp32 (highest precision): a form that is wrong is reported and not
timed. The bars are those of the tests: fp32 1e-4; bf16 0.005 forward, 0.01 gradients, 0.02 gradients of gates,
strengths and sinks, which are sums over all tokens. A backend that says beforehand that it does not serve a case is
"refused"; whatever else a form raises is its "error". The exit code is 1 if a form was wrong or had an error; what a
peer cannot do is in its row alone.

With --out, rows are on disk as soon as they are known, and "unfinished" names what is being measured: a process that
dies loses that one.

Times are medians of 20 turns after warm-up, each turn long enough (10 ms) that a launch does not count, the device
synchronised at its end. Backward passes are given a cotangent that is ready: no loss is timed. The floor is what the
arrays' bytes take at the device's memory bandwidth (forward: inputs and output; forward and backward: the inputs twice,
output, its cotangent, all gradients), or the unavoidable FLOPs at its peak, whichever is more.
"""

import argparse
import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.benchmarks import kernel_cases, kernel_checks, timing
from recollect.benchmarks.kernel_case import LIBRARIES
from recollect.benchmarks.kernel_checks import Check, cotangent, drawn
from recollect.benchmarks.machine import OtherLoad
from recollect.benchmarks.peer_process import PeerProcess
from recollect.benchmarks.peer_side import one_line
from recollect.benchmarks.reporting import Parser, keep, number, print_device
from recollect.pallas_kernels.dispatch import BACKENDS, Refused

LENGTHS = tuple(1024 * 2**i for i in range(7))
SLOWEST = 2.0  # seconds per call, after which --lengths tries no longer sequences
PARTS = ("forward", "both")

OPERATIONS, CHOSEN = kernel_cases.OPERATIONS, [name for name in BACKENDS if name != "reference"]
OPTIONS = {
    "operations": {"nargs": "+", "default": list(OPERATIONS), "metavar": "NAME", "help": f"of {', '.join(OPERATIONS)}"},
    "backends": {"nargs": "+", "default": CHOSEN, "metavar": "NAME", "help": f"of {', '.join(BACKENDS)}"},
    "dtype": {"choices": ("bfloat16", "float32"), "help": "default: bfloat16 on accelerators, float32 on CPU"},
    "peer-python": {"metavar": "PYTHON", "help": "an interpreter with torch and flash-linear-attention"},
    "peer-seconds": number(300.0, "that a peer may take for one case, compiling included"),
    "lengths": {"action": "store_true", "help": "time and memory of the xla forms at 1k to 64k tokens instead"},
    "longest": number(LENGTHS[-1], "for --lengths"),
}

Save = Callable[[str | None], None]
"""Called with what is measured next, or with None at the end."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a form was wrong or had an error.

    Raises:
      UserError: an operation or backend that does not exist, or a peer's interpreter that does not run.
    """
    parser = Parser("kernels", __doc__, OPTIONS, "kernels.json (lengths: kernel_lengths.json)")
    options = parser.parse(arguments, known={"operations": OPERATIONS, "backends": BACKENDS})
    # Peers share the GPU with this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print_device()
    rows: list[dict[str, Any]] = []
    file = "kernel_lengths.json" if options.lengths else "kernels.json"

    def save(unfinished: str | None) -> None:
        keep(options.out, file, "kernels", arguments, {"rows": rows}, unfinished=unfinished)

    (_lengths if options.lengths else _times)(options, rows, save)
    save(None)
    return 1 if any(row.get("wrong") or ("error" in row and row["form"] != "peer") for row in rows) else 0


def _times(options: argparse.Namespace, rows: list[dict[str, Any]], save: Save) -> None:
    platform = jax.default_backend()
    dtype = jnp.dtype(options.dtype or ("float32" if platform == "cpu" else "bfloat16"))
    with contextlib.closing(_Peers(options.peer_python, options.peer_seconds)) as peers:
        columns = f"{'ms':>10} {'x floor':>6} {'x peer':>6}"
        print(f"{'':74} {'forward':>24} {'forward + backward':>24}\n{'':74} {columns} {columns}")
        for case in kernel_cases.cases(platform, options.operations):
            print(f"{case.name} {dtype}")
            inputs, check = drawn(case, 0, dtype), Check(kernel_cases.smaller(case), dtype)
            facts = {"case": case.name, "operation": case.operation, "variant": case.variant, **case.sizes}
            floor = timing.floors(case, inputs, jax.devices()[0].device_kind)
            small = dict(_forms(check.case, options.backends))
            measure = {
                form: functools.partial(_row, function, inputs, small[form], check)
                for form, function in _forms(case, options.backends)
            }
            if options.peer_python is not None and case.peer is not None:
                measure = {"peer": functools.partial(peers.measure, case), **measure}
            peer: dict[str, Any] = {}
            for form, measured in measure.items():
                save(f"{case.name} {dtype}, {form}")
                row = {"form": form, **measured(), **facts, "dtype": str(dtype), "floor": floor}
                peer = row if form == "peer" else peer
                _print(row, peer)
                rows.append(row)


class _Peers:
    """kernel_peers.py, started again for the next case where it died or is of no more use."""

    def __init__(self, python: str | None, seconds: float):
        self.start = functools.partial(PeerProcess, "--peer-python", python or "", ["kernel_peers.py"], seconds)
        self.process = None if python is None else self.start()

    def measure(self, case: Any) -> dict[str, Any]:
        """Returns its times for a case, or {"error"} with the reason there are none."""
        if self.process is None or not self.process.alive:
            self.process = self.start()
        answer = self.process.ask({"peer": case.peer, "sizes": case.sizes})
        if answer.pop("broken", False):
            self.close()
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.close()


def _row(function: Callable[..., Any], inputs: dict[str, Any], small: Callable[..., Any], check: Any) -> dict[str, Any]:
    """Returns what is learnt of one form: refused, wrong, an error, or its times."""
    row: dict[str, Any] = {}
    try:
        jax.eval_shape(function, inputs)  # a backend that refuses does so here, before anything is compiled
        errors = check.errors(small)
        row |= {"errors": errors, "wrong": kernel_checks.wrong(errors)}
        if not row["wrong"]:
            load, output_cotangent = OtherLoad(), cotangent(function, inputs)
            row["forward"] = timing.timed(jax.jit(function), inputs)[0]
            row["both"] = timing.timed(jax.jit(kernel_checks.with_gradients(function)), inputs, output_cotangent)[0]
            row["cores_kept_busy_by_others"] = round(load.cores(), 2)
    except Refused as error:
        row["refused"] = " ".join(str(error).split())
    except Exception as error:
        # Out of memory, or a compiler's complaint: the other rows still count.
        row["error"] = one_line(error, 300)
    return row


def _forms(case: Any, backends: list[str]) -> list[tuple[str, Callable[..., Any]]]:
    served = [name for name in backends if name not in LIBRARIES or name in case.libraries]
    return [(name, lambda x, name=name: case.run(x, name)) for name in served] + list(case.plain.items())


def _print(row: dict[str, Any], peer: dict[str, Any]) -> None:
    label = f"    {row['form']}" + (f" ({row['version']})" if "version" in row else "")
    if "forward" not in row:
        reason = row.get("refused") or row.get("error") or f"WRONG: {', '.join(row['wrong'])}: {row['errors']}"
        print(f"{label:40} {reason}", flush=True)
        return
    cells = []
    for part in PARTS:
        if part not in row:
            cells.append(row.get("backward_error") or row["error"])
            continue
        floor = f"{row[part] / row['floor'][part]:.2f}" if row["floor"] else "-"
        beside = f"{row[part] / peer[part]:.2f}" if part in peer and row is not peer else "-"
        cells.append(f"{1e3 * row[part]:10.3f} {floor:>6} {beside:>6}")
    print(f"{label:74} {' '.join(cells)}", flush=True)


def _lengths(options: argparse.Namespace, rows: list[dict[str, Any]], save: Save) -> None:
    """Measures time and temporary memory of the xla forms, forward and gradient, as the sequence grows."""
    print(f"{'xla forms, b1, fp32':62} {'tokens':>8} {'ms':>10} {'x before':>8} {'MiB temporary':>14} {'x before':>8}")
    for key, make in kernel_cases.CASES.items():
        for sizes in kernel_cases.shapes_of(kernel_cases.GROWTH, *key) if key[0] in options.operations else ():
            label = ", ".join(key) + "".join(f" {name}{sizes[name]}" for name in ("w", "block") if name in sizes)
            before: dict[str, Any] | None = None
            for t in (length for length in LENGTHS if length <= options.longest):
                if before is not None and before["both"] > SLOWEST:
                    print(f"{label:62} {t:>8,} not timed, as {before['t']:,} tokens take more than {SLOWEST:g} s")
                    break
                case = make(t=t, **sizes)
                save(case.name)
                inputs, form = drawn(case, 0, jnp.float32), functools.partial(case.run, backend="xla")
                arrays = inputs, cotangent(form, inputs)
                run = jax.jit(kernel_checks.with_gradients(form)).lower(*arrays).compile()
                row = {"case": case.name, "operation": key[0], "variant": key[1], "t": t}
                row["both"] = timing.timed(run, *arrays)[0]
                row["temporary_bytes"] = run.memory_analysis().temp_size_in_bytes
                compared = ("", "") if before is None else [_ratio(row, before, x) for x in ("both", "temporary_bytes")]
                memory = f"{row['temporary_bytes'] / 2**20:14.2f} {compared[1]:>8}"
                print(f"{label:62} {t:>8,} {1e3 * row['both']:10.2f} {compared[0]:>8} {memory}", flush=True)
                before = row
                rows.append(row)


def _ratio(row: dict[str, Any], before: dict[str, Any], name: str) -> str:
    return f"{row[name] / (before[name] or 1):.2f}"
