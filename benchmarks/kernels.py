"""Times every kernel operation on every backend that serves it here, beside plain jnp and, on a GPU, flash-linear-attention and torch.

    python main.py bench kernels                              # on whatever device jax finds
    python main.py bench kernels --out                        # and keep the results under benchmarks/results/DEVICE/kernels.json
    python main.py bench kernels --peer-python PYTHON --out   # PYTHON has torch and flash-linear-attention
    python main.py bench kernels --lengths                    # time and memory of the xla forms at 1k to 64k tokens, as far as a call takes 2 s

Before a backend is timed at a shape, its outputs and gradients at the same head sizes (one row, two heads, 320 tokens) are compared on this
device with the reference in fp32 (highest precision): a form that is wrong is reported and not timed. The bars are those of
the tests: fp32 1e-4; bf16 0.005 forward, 0.01 gradients, 0.02 gradients of gates, strengths and sinks, which are sums over all tokens.

Times are medians of 20 turns after warm-up, each turn long enough (10 ms) that a launch does not count, the device synchronised at
its end. The floor is what the arrays' bytes take at the device's memory bandwidth (forward: inputs and output; forward and backward: the
inputs twice, output, its cotangent, all gradients), or the unavoidable FLOPs at its peak, whichever is more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.kernel_case import LIBRARIES
from benchmarks.machine import OtherLoad
from benchmarks.reporting import REPOSITORY, Parser, keep, say_device
from configuration import UserError

TURNS = 20
FORWARD, GRADIENT, GATE = 0.005, 0.01, 0.02
FULL = 1e-4
GATES = ("log_decay", "beta", "taps", "filter", "sinks", "router")
LENGTHS = tuple(1024 * 2**i for i in range(7))
SLOWEST = 2.0  # seconds a call, after which --lengths tries no longer sequences


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a form was wrong.

    Raises:
      UserError: an operation or backend that does not exist, or a peer's interpreter that does not run.
    """
    from benchmarks.kernel_cases import OPERATIONS
    from pallas_kernels.dispatch import BACKENDS

    parser = Parser("kernels", __doc__)
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), metavar="NAME", help=f"of {', '.join(OPERATIONS)}")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=[name for name in BACKENDS if name != "reference"],
        metavar="NAME",
        help=f"of {', '.join(BACKENDS)}",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on accelerators, float32 on CPU")
    parser.add_argument("--peer-python", metavar="PYTHON", help="an interpreter with torch and flash-linear-attention")
    parser.add_argument("--lengths", action="store_true", help="time and memory of the xla forms at 1k to 64k tokens instead")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="for --lengths")
    parser.add_out("kernels.json (lengths: kernel_lengths.json)")
    options = parser.parse_args(arguments)
    for name, given, known in (("operation", options.operations, OPERATIONS), ("backend", options.backends, BACKENDS)):
        for each in given:
            if each not in known:
                raise UserError(f"bench kernels: no {name} {each!r}; there are {', '.join(known)}")
    # Peers share the GPU with this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    say_device()
    rows = _lengths(options) if options.lengths else _times(options)
    keep(options.out, "kernel_lengths.json" if options.lengths else "kernels.json", "kernels", arguments, {"rows": rows})
    return 1 if any(row.get("wrong") for row in rows) else 0


def _times(options: argparse.Namespace) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from benchmarks.kernel_cases import cases, smaller

    platform = jax.default_backend()
    dtype = jnp.dtype(options.dtype or ("float32" if platform == "cpu" else "bfloat16"))
    rows: list[dict[str, Any]] = []
    peers = None if options.peer_python is None else Peers(options.peer_python)
    print(
        f"{'':74} {'forward':>24} {'forward + backward':>24}\n{'':74} {'ms':>10} {'x floor':>6} {'x peer':>6} {'ms':>10} {'x floor':>6} {'x peer':>6}"
    )
    for case in cases(platform, options.operations):
        print(f"{case.name} {dtype}")
        inputs = case.inputs(jax.random.key(0), dtype)
        floors = _floors(case, inputs, device_kind=jax.devices()[0].device_kind)
        found: list[dict[str, Any]] = []
        if peers is not None and case.peer is not None:
            found.append({"form": "peer", **peers.measure(case)})
        for form, function in _forms(case, options.backends):
            row: dict[str, Any] = {"form": form}
            try:
                errors = _errors(smaller(case), form, dtype)
                row |= {"errors": errors, "wrong": [name for name, (error, bar) in errors.items() if not error <= bar]}
                if not row["wrong"]:
                    load = OtherLoad()
                    row |= {"forward": timed(function, inputs), "both": timed(_gradient(function), inputs)}
                    row["cores_kept_busy_by_others"] = round(load.cores(), 2)
            except ValueError as error:
                row["refused"] = " ".join(str(error).split())
            except Exception as error:
                # Out of memory, or a compiler's complaint: the other rows still count.
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found.append(row)
        for row in found:
            row |= {
                "case": case.name,
                "operation": case.operation,
                "variant": case.variant,
                **case.sizes,
                "dtype": str(dtype),
                "floor": floors,
            }
            _print(row, next((each for each in found if each["form"] == "peer" and "forward" in each), None))
        rows += found
    return rows


def _forms(case: Any, backends: list[str]) -> list[tuple[str, Callable[..., Any]]]:
    served = [name for name in backends if name not in LIBRARIES or name in case.libraries]
    return [(name, lambda x, name=name: case.run(x, name)) for name in served] + list(case.plain.items())


def _gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    def loss(x):
        o = function(x).astype(jnp.float32)
        return jnp.sum(o * jnp.cos(jnp.arange(o.shape[-1])))

    return jax.value_and_grad(loss)


def _errors(case: Any, form: str, dtype: Any) -> dict[str, tuple[float, float]]:
    """rms(error) / rms(reference) and its bar, for the output and each gradient, at a small shape."""
    import jax
    import jax.numpy as jnp

    inputs = case.inputs(jax.random.key(1), dtype)
    function = dict(_forms(case, [form]))[form]
    exact = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    with jax.default_matmul_precision("highest"):
        expected = (jax.jit(lambda x: case.run(x, "reference"))(exact), jax.jit(_gradient(lambda x: case.run(x, "reference")))(exact)[1])
        here = _as_users_run(function, inputs, dtype)
    errors = {"output": (_error(here[0], expected[0]), FORWARD)}
    errors |= {name: (_error(here[1][name], expected[1][name]), GATE if name in GATES else GRADIENT) for name in inputs}
    return errors if dtype == jnp.bfloat16 else {name: (error, FULL) for name, (error, _) in errors.items()}


def _as_users_run(function: Callable[..., Any], inputs: dict[str, Any], dtype: Any) -> Any:
    """Output and gradients as users run them: bf16 at default precision, fp32 at the highest."""
    import jax
    import jax.numpy as jnp

    with jax.default_matmul_precision("default" if dtype == jnp.bfloat16 else "highest"):
        return jax.jit(function)(inputs), jax.jit(_gradient(function))(inputs)[1]


def _error(found: Any, expected: Any) -> float:
    import numpy as np

    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-30))


def timed(function: Callable[..., Any], inputs: Any) -> float:
    """Median seconds a call, compiled."""
    import jax

    run = jax.jit(function)
    jax.block_until_ready(run(inputs))
    start = time.perf_counter()
    jax.block_until_ready(run(inputs))
    calls = max(1, int(0.01 / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        for _ in range(calls):
            out = run(inputs)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _floors(case: Any, inputs: dict[str, Any], device_kind: str) -> dict[str, float] | None:
    """Seconds that no form can beat on this device: forward, and forward and backward; None where its peaks are not known."""
    import jax

    from training.chips import chip_of

    chip = chip_of(device_kind)
    if chip is None:
        return None
    output = jax.eval_shape(lambda x: case.run(x, "reference"), inputs)
    taken, given = sum(x.nbytes for x in inputs.values()), output.size * output.dtype.itemsize
    return {
        "forward": max((taken + given) / chip.bandwidth, case.work / chip.flops),
        "both": max((3 * taken + 2 * given) / chip.bandwidth, 3 * case.work / chip.flops),
    }


def _print(row: dict[str, Any], peer: dict[str, Any] | None) -> None:
    label = f"    {row['form']}" + (f" ({row['version']})" if "version" in row else "")
    if "forward" not in row:
        reason = row.get("refused") or row.get("error") or f"WRONG: {', '.join(row['wrong'])}: {row['errors']}"
        print(f"{label:40} {reason}")
        return
    cells = []
    for part in ("forward", "both"):
        floor = f"{row[part] / row['floor'][part]:.2f}" if row["floor"] else "-"
        beside = "-" if peer is None or row["form"] == "peer" else f"{row[part] / peer[part]:.2f}"
        cells.append(f"{1e3 * row[part]:10.3f} {floor:>6} {beside:>6}")
    print(f"{label:74} {' '.join(cells)}", flush=True)


class Peers:
    """kernel_peers.py in a process of its own.

    Raises:
      UserError: the interpreter does not start.
    """

    def __init__(self, python: str):
        script = str(REPOSITORY / "benchmarks" / "kernel_peers.py")
        try:
            self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise UserError(f"--peer-python {python!r} does not run: {error.strerror}") from error

    def measure(self, case: Any) -> dict[str, Any]:
        """Its times for this case, or the reason there are none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"peer": case.peer, "sizes": case.sizes}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line[len("RESULT ") :])
        return {"error": "the peer's process ended"}


def _lengths(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and temporary memory of the xla forms, forward and gradient, as the sequence grows."""
    import jax
    import jax.numpy as jnp

    from benchmarks.kernel_cases import CASES, GROWTH, shapes_of

    rows: list[dict[str, Any]] = []
    print(f"{'xla forms, b1, fp32':62} {'tokens':>8} {'ms':>10} {'x before':>8} {'MiB temporary':>14} {'x before':>8}")
    for key, make in CASES.items():
        for sizes in shapes_of(GROWTH, *key) if key[0] in options.operations else ():
            before: dict[str, Any] | None = None
            for t in (length for length in LENGTHS if length <= options.longest):
                case = make(t=t, **sizes)
                label = ", ".join(key) + "".join(f" {name}{size}" for name, size in sizes.items() if name in ("w", "block"))
                if before is not None and before["both"] > SLOWEST:
                    print(f"{label:62} {t:>8,} not timed, as {before['t']:,} tokens take more than {SLOWEST:g} s")
                    break
                inputs = case.inputs(jax.random.key(0), jnp.float32)
                function = _gradient(lambda x, case=case: case.run(x, "xla"))
                memory = jax.jit(function).lower(inputs).compile().memory_analysis().temp_size_in_bytes
                row = {"case": case.name, "operation": key[0], "variant": key[1], "t": t, "both": timed(function, inputs)}
                row["temporary_bytes"] = memory
                growth = ("", "")
                if before is not None:
                    growth = (f"{row['both'] / before['both']:.2f}", f"{memory / max(before['temporary_bytes'], 1):.2f}")
                print(f"{label:62} {t:>8,} {1e3 * row['both']:10.2f} {growth[0]:>8} {memory / 2**20:14.2f} {growth[1]:>8}", flush=True)
                before = row
                rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
