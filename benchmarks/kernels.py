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

import jax
import jax.numpy as jnp

from recollect.benchmarks import kernel_case, kernel_cases, kernel_shapes, peer_process, peer_side, reporting, timing
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
    "peer-seconds": reporting.number(300.0, "that a peer may take for one case, compiling included"),
    "lengths": {"action": "store_true", "help": "time and memory of the xla forms at 1k to 64k tokens instead"},
    "longest": reporting.number(LENGTHS[-1], "for --lengths"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a form was wrong or had an error.

    Raises:
      UserError: an operation or backend that does not exist, or a peer's interpreter that does not run.
    """
    parser = reporting.Parser("kernels", __doc__, OPTIONS, "kernels.json (lengths: kernel_lengths.json)")
    options = parser.parse(arguments, known={"operations": OPERATIONS, "backends": BACKENDS})
    # Peers share the GPU with this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    reporting.print_device()
    rows: list[dict] = []
    measure, file = (_lengths, "kernel_lengths.json") if options.lengths else (_times, "kernels.json")

    def save(unfinished: str | None) -> None:
        """Keeps the rows so far; unfinished: what is measured next, None at the end."""
        reporting.keep(options.out, file, "kernels", arguments, {"rows": rows}, unfinished=unfinished)

    measure(options, rows, save)
    save(None)
    return 1 if any(row.get("wrong") or ("error" in row and row["form"] != "peer") for row in rows) else 0


def _times(options: argparse.Namespace, rows: list[dict], save) -> None:
    dtype = jnp.dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    columns = f"{'ms':>10} {'x floor':>6} {'x peer':>6}"
    with contextlib.ExitStack() as stack:
        if options.peer_python is not None:
            peers = peer_process.PeerProcess(
                "--peer-python", options.peer_python, ["kernel_peers.py"], options.peer_seconds
            )
            stack.callback(peers.close)
        print(f"{'':74} {'forward':>24} {'forward + backward':>24}\n{'':74} {columns} {columns}")
        for case in kernel_cases.cases(jax.default_backend(), options.operations):
            print(f"{case.name} {dtype}")
            inputs = kernel_case.drawn(case, 0, dtype)
            check = kernel_case.Check(kernel_cases.smaller(case), dtype)
            facts = {
                "case": case.name,
                "operation": case.operation,
                "variant": case.variant,
                **case.sizes,
                "dtype": str(dtype),
                "floor": timing.floors(case, inputs, jax.devices()[0].device_kind),
            }
            forms, small = (_forms(each, options.backends) for each in (case, check.case))
            measure = {form: functools.partial(_row, forms[form], inputs, small[form], check) for form in forms}
            if options.peer_python is not None and case.peer is not None:
                measure = {"peer": functools.partial(_peer, peers, case), **measure}
            peer: dict = {}
            for form, measured in measure.items():
                save(f"{case.name} {dtype}, {form}")
                row = {"form": form, **measured(), **facts}
                peer = row if form == "peer" else peer
                _print(row, peer)
                rows.append(row)


def _peer(process: peer_process.PeerProcess, case: kernel_case.Case) -> dict:
    """Returns the times of a case's peer, or {"error"} with the reason there are none; the process is started again
    where it died or is of no more use."""
    if not process.alive:
        process.start()
    answer = process.ask({"peer": case.peer, "sizes": case.sizes})
    if answer.pop("broken", False):
        process.close()
    return answer


def _row(function, inputs: kernel_case.Arrays, small, check: kernel_case.Check) -> dict:
    """Returns what is learnt of one form: refused, wrong, an error, or its times."""
    row: dict = {}
    try:
        jax.eval_shape(function, inputs)  # a backend that refuses does so here, before anything is compiled
        row["errors"] = check.errors(small)
        row["wrong"] = kernel_case.wrong(row["errors"])
        if not row["wrong"]:
            load, output_cotangent = timing.OtherLoad(), kernel_case.cotangent(function, inputs)
            row["forward"] = timing.timed(jax.jit(function), inputs)[0]
            row["both"] = timing.timed(jax.jit(kernel_case.with_gradients(function)), inputs, output_cotangent)[0]
            row["cores_kept_busy_by_others"] = round(load.cores(), 2)
    except Refused as error:
        row["refused"] = " ".join(str(error).split())
    except Exception as error:
        # Out of memory, or a compiler's complaint: the other rows still count.
        row["error"] = peer_side.one_line(error, 300)
    return row


def _forms(case: kernel_case.Case, backends: list[str]) -> dict[str, kernel_case.Form]:
    served = (name for name in backends if name not in kernel_case.LIBRARIES or name in case.libraries)
    return {name: lambda x, name=name: case.run(x, name) for name in served} | dict(case.plain)


def _print(row: dict, peer: dict) -> None:
    label = f"    {row['form']}" + (f" ({row['version']})" if "version" in row else "")
    if "forward" not in row:
        reason = row.get("refused") or row.get("error") or f"WRONG: {', '.join(row['wrong'])}: {row['errors']}"
        print(f"{label:40} {reason}", flush=True)
        return
    print(f"{label:74} {' '.join(_cell(row, peer, part) for part in PARTS)}", flush=True)


def _cell(row: dict, peer: dict, part: str) -> str:
    if part not in row:
        return row.get("backward_error") or row["error"]
    floor = f"{row[part] / row['floor'][part]:.2f}" if row["floor"] else "-"
    beside = f"{row[part] / peer[part]:.2f}" if part in peer and row is not peer else "-"
    return f"{1e3 * row[part]:10.3f} {floor:>6} {beside:>6}"


def _lengths(options: argparse.Namespace, rows: list[dict], save) -> None:
    """Measures time and temporary memory of the xla forms, forward and gradient, as the sequence grows."""
    print(f"{'xla forms, b1, fp32':62} {'tokens':>8} {'ms':>10} {'x before':>8} {'MiB temporary':>14} {'x before':>8}")
    for key, make in kernel_cases.CASES.items():
        for sizes in kernel_shapes.shapes_of(kernel_shapes.GROWTH, *key) if key[0] in options.operations else ():
            label = ", ".join(key) + "".join(f" {name}{sizes[name]}" for name in ("w", "block") if name in sizes)
            before: dict = {}
            for t in (length for length in LENGTHS if length <= options.longest):
                if before.get("both", 0.0) > SLOWEST:
                    print(f"{label:62} {t:>8,} not timed, as {before['t']:,} tokens take more than {SLOWEST:g} s")
                    break
                case = make(t=t, **sizes)
                save(case.name)
                inputs, form = kernel_case.drawn(case, 0, jnp.float32), functools.partial(case.run, backend="xla")
                arrays = inputs, kernel_case.cotangent(form, inputs)
                run = jax.jit(kernel_case.with_gradients(form)).lower(*arrays).compile()
                row = {
                    "case": case.name,
                    "operation": key[0],
                    "variant": key[1],
                    "t": t,
                    "both": timing.timed(run, *arrays)[0],
                    "temporary_bytes": run.memory_analysis().temp_size_in_bytes,
                }
                time, memory = f"{1e3 * row['both']:10.2f}", f"{row['temporary_bytes'] / 2**20:14.2f}"
                grown = [f"{row[x] / (before[x] or 1):.2f}" if before else "" for x in ("both", "temporary_bytes")]
                print(f"{label:62} {t:>8,} {time} {grown[0]:>8} {memory} {grown[1]:>8}", flush=True)
                before = row
                rows.append(row)
