"""One side of `bench recurrences`, in a process of its own: this project, or jax-linear-attention's plain-JAX forms.

    PYTHON benchmarks/recurrence_sides.py ours|peer < commands.jsonl

Reads one JSON line per command and answers each with a line "RESULT {...}".

- {"case", "inputs", "outputs"}: loads the arrays of `inputs` (.npz), compiles the case, and writes to `outputs` its
  output o and the gradient of every input for the cotangent among `inputs`. The answer has the versions.
- {"part": "forward" or "both", "seconds"}: calls it for about that long. The answer has seconds per call, by the clock
  and of the process's CPU time.

A command that fails is answered {"error"}. Of this project the peer's side imports peer_side.py alone, ours also
pallas_kernels: any interpreter with jax serves ours.
"""

import functools
import importlib.metadata
import platform
import sys
import time

from recollect.benchmarks.peer_side import serve

GATES = {
    "simple_gla": {"g": "head"},
    "gla": {"g": "channel"},
    "delta_rule": {"beta": "head"},
    "gated_delta_rule": {"g": "head", "beta": "head"},
    "kda": {"g": "channel", "beta": "head"},
    "gdn2": {"g": "channel", "b": "channel", "w": "channel"},
    "rwkv7": {"g": "channel", "a": "channel", "b": "channel"},
}
"""Of each case its inputs beside q, k and v: (b, t, h) or (b, t, h, d)."""

PEER_KINDS = {"delta_rule": "deltanet", "gated_delta_rule": "gated_deltanet"}
"""Cases that jax-linear-attention names otherwise."""

CALLS: dict = {}
"""The forward pass and both passes of the case that was prepared last."""


def ours(case: str, q, k, v, **gates):
    """Returns o of recollect.pallas_kernels.linear_recurrence on backend "xla"."""
    from recollect.pallas_kernels.linear_recurrence import linear_recurrence

    terms = {"log_decay": gates.get("g"), "scale": q.shape[-1] ** -0.5}
    if "beta" in gates:
        terms |= {"erase_read": gates["beta"][..., None] * k, "write_strength": gates["beta"]}
    if case == "gdn2":
        terms |= {"erase_read": gates["b"] * k, "write_strength": gates["w"]}
    if case == "rwkv7":
        terms |= {"erase_read": -gates["a"], "erase_write": gates["b"], "erase_before_decay": True}
    return linear_recurrence(q, k, v, **terms, backend="xla")[0]


def peer(case: str, q, k, v, **gates):
    """Returns o of jax-linear-attention's plain-JAX chunked form."""
    from jla.ops import linear_attention

    if case == "rwkv7":
        gates["w"] = gates.pop("g")
    kind = PEER_KINDS.get(case, case)
    return linear_attention(kind, q, k, v, impl="chunked", scale=q.shape[-1] ** -0.5, **gates)[0]


def prepare(function, case: str, inputs: str, outputs: str) -> dict:
    """Compiles both parts of a case and writes outputs and gradients; returns versions and device."""
    import jax
    import numpy as np

    # Their products are fp32 throughout; on a GPU ours are only if asked.
    jax.config.update("jax_default_matmul_precision", "highest")
    arrays = {name: jax.numpy.asarray(x) for name, x in np.load(inputs).items()}
    cotangent = arrays.pop("cotangent")

    def run(arrays):
        return function(case, **arrays)

    @jax.jit
    def both(arrays, cotangent):
        o, vjp = jax.vjp(run, arrays)
        return o, vjp(cotangent)[0]

    CALLS["forward"], CALLS["both"] = (
        functools.partial(jax.jit(run), arrays),
        functools.partial(both, arrays, cotangent),
    )
    o, gradients = jax.block_until_ready(CALLS["both"]())
    jax.block_until_ready(CALLS["forward"]())
    np.savez(outputs, o=o, **{f"d{name}": x for name, x in gradients.items()})
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    if "jla" in sys.modules:
        versions["jax-linear-attention"] = importlib.metadata.version("jax-linear-attention")
    return {"versions": versions, "device": jax.devices()[0].device_kind}


def turn(part: str, seconds: float) -> dict[str, float]:
    """Returns seconds per call of at least one call, by the clock and of CPU time."""
    import jax

    calls, start, used = 0, time.perf_counter(), time.process_time()
    while calls == 0 or time.perf_counter() - start < seconds:
        jax.block_until_ready(CALLS[part]())
        calls += 1
    return {"clock": (time.perf_counter() - start) / calls, "cpu": (time.process_time() - used) / calls}


SIDES = {"ours": (ours, "recollect.pallas_kernels.linear_recurrence"), "peer": (peer, "jla.ops")}
"""The function of each side, and what it imports."""


def main() -> None:
    """Answers commands until there are no more."""
    function, library = SIDES[sys.argv[1]]
    # Before anything is traced: pallas_kernels adds to what jax keys programs by, and would have them compiled again.
    importlib.import_module(library)
    serve(lambda command: prepare(function, **command) if "case" in command else turn(**command))


if __name__ == "__main__":
    main()
