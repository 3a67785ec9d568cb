"""Times one attention layer that decodes, per token, by cache policy and length of the context, with bytes held.

    python main.py bench caches                            # 2,048 to 65,536 tokens, a budget of 256
    python main.py bench caches --lengths 1024 --budget 64 --out

A row is one policy at one length: a state for so many tokens of one sequence, and a compiled loop that decodes
`--steps` tokens by `extend`, the median of `--turns`, policies in turns so that whatever else the machine does meets
all of them. What the state holds changes nothing: shapes are fixed, and free slots are read and masked. Bytes are those
of the state's arrays; keys read are what the policy states for a full context. Parameters are random.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recollect.benchmarks import reporting, timing
from recollect.evaluation.table import format_bytes
from recollect.layers import Attention, Place
from recollect.layers.modules import Rotary
from recollect.layers.state import (
    CachePolicy,
    Full,
    HeavyHitters,
    HiP,
    LongHeads,
    Quantised,
    Recycled,
    SnapKV,
    StreamingLLM,
)
from recollect.models.language_model import state_bytes

OPTIONS = {
    "lengths": {"nargs": "+", "type": int, "default": [2048, 8192, 16384, 65536], "help": "tokens of the context"},
    "budget": reporting.number(256, "tokens that policies keep, or read, per key head"),
    "heads": reporting.number(8, "query heads"),
    "key-heads": reporting.number(2, "key heads"),
    "dim": reporting.number(64, "dimensions per head"),
    "steps": reporting.number(32, "tokens decoded per call"),
    "turns": reporting.number(5, "calls that are timed"),
}


def policies(budget: int) -> dict[str, CachePolicy]:
    """Returns the policies that are timed, by name; all keep or read about `budget` keys but for the first three."""
    return {
        "full": Full(),
        "int8": Quantised(bits=8),
        "int4": Quantised(bits=4),
        "streaming": StreamingLLM(budget=budget),
        "heavy_hitters": HeavyHitters(budget=budget),
        "snap_kv": SnapKV(budget=budget - budget // 4, window=budget // 8, recent=budget // 4),
        "recycled": Recycled(top=budget, every=32),
        "hip": HiP(block=4, top=budget // 2 // 4 * 4, window=budget // 2, every=8),
        "long_heads": LongHeads(chunk=budget // 4, top=4),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Raises:
      UserError: an option that does not fit.
    """
    parser = reporting.Parser("caches", __doc__, OPTIONS, "caches.json")
    positive = ("budget", "heads", "key_heads", "dim", "steps", "turns")
    options = parser.parse(arguments, positive=positive)
    if min(options.lengths) <= options.steps:
        parser.error(f"--lengths {min(options.lengths)}: must be above --steps {options.steps}")
    if options.budget < 32:
        parser.error(f"--budget {options.budget}: must be at least 32, to be divided among a policy's parts")
    reporting.print_device()
    print(f"{'tokens':>8}  {'policy':14} {'ms a token':>10} {'of full':>8} {'bytes held':>11} {'keys read':>10}")
    rows, load = [], timing.OtherLoad()
    for length in options.lengths:
        rows += of_length(length, options)
        for row in rows[-len(policies(options.budget)) :]:
            print(
                f"{row['length']:8,}  {row['policy']:14} {row['milliseconds']:10.3f} {row['of_full']:8.2f} "
                f"{format_bytes(row['bytes_held']):>11} {row['keys_read']:10,.1f}",
                flush=True,
            )
    facts = {"cores_kept_busy_by_others": round(load.cores(), 2), "rows": rows}
    reporting.keep(options.out, "caches.json", "caches", arguments, facts)
    return 0


def of_length(length: int, options: Any) -> list[dict[str, Any]]:
    """Returns the rows of one length."""
    width, runs, facts = options.heads * options.dim, {}, {}
    for name, policy in policies(options.budget).items():
        config = Attention(heads=options.heads, key_heads=options.key_heads, positions=Rotary(), cache=policy)
        module = config.build(width, Place(), nnx.Rngs(params=jax.random.key(0)))
        state = module.init_state(1, length)
        facts[name] = {"bytes_held": state_bytes(state), "keys_read": policy.keys_read(length)}
        runs[name] = _decoding(module, state, jax.random.normal(jax.random.key(1), (options.steps, 1, 1, width)))
    times = timing.time_in_turns(runs, options.turns)
    return [
        {
            "length": length,
            "policy": name,
            "milliseconds": 1000 * times[name] / options.steps,
            "of_full": times[name] / times["full"],
            **facts[name],
        }
        for name in runs
    ]


def _decoding(module: Any, state: Any, x: jax.Array) -> Any:
    """Returns a function that decodes the tokens x (steps, 1, 1, d) from a state, in place."""

    def run(state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        def step(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
            out, state = module.extend(token, state)
            return state, out.hidden

        after, out = jax.lax.scan(step, state, x)
        return jnp.sum(out), jax.tree.map(lambda new, old: new if new.ndim > 2 else old, after, state)

    compiled, held = jax.jit(run, donate_argnums=0), [state]

    def call() -> jax.Array:
        total, held[0] = compiled(held[0], x)
        return total

    return call
