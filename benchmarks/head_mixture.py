"""Times mixture-of-heads attention as it runs against the same layer with every head computed, by the share of heads
that are active.

    python main.py bench head-mixture                          # 8 heads of 64, 1,024 tokens, batch 2
    python main.py bench head-mixture --out                    # also writes benchmarks/results/DEVICE/head_mixture.json
    python main.py bench head-mixture --length 2048 --head-dim 32 --batch 4

"dense" is the layer as the authors' code computes it: attention of all heads for all tokens, then gates of which most
are zero. "gathered" computes routed heads for the tokens that chose them (pallas_kernels/head_mixture_attention). Both
hold the same weights, and the layer's output and gradients are compared before anything is timed. Times are of the
mixer (forward; forward and backward, by weights and input) and of the training step of a language model of two such
layers (with --mlp, each with a SwiGLU MLP; loss, gradients and AdamW's update): medians of turns in which both take
theirs one after the other, so that whatever else the machine does meets both. Routers are freshly initialised and
inputs random: choices are spread nearly evenly over heads.
"""

import contextlib
import functools
from argparse import Namespace
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from recollect.benchmarks import kernel_case, reporting, timing
from recollect.layers import MixtureOfHeads, Place
from recollect.layers.modules import SwiGLU
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.training import AdamW

VOCABULARY = 256
CLOSE = 1e-4
FORMS = ("dense", "gathered")
PARTS = ("forward", "forward_backward", "training_step")
OPTIONS = {
    "length": reporting.number(1024, "tokens"),
    "batch": reporting.number(2, "sequences"),
    "heads": reporting.number(8, "heads in all"),
    "head-dim": reporting.number(64, "dimensions per head; the width is heads times this"),
    "turns": reporting.number(9, "turns of which the median is taken"),
    "mlp": {"action": "store_true", "help": "an MLP after each mixer of the model that is trained"},
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if the two forms differ.

    Raises:
      UserError: an option that does not fit.
    """
    parser = reporting.Parser("head-mixture", __doc__, OPTIONS, "head_mixture.json")
    options = parser.parse(arguments, positive=("length", "batch", "heads", "head_dim", "turns"))
    reporting.print_device()
    print(
        f"batch {options.batch}, {options.length} tokens, {options.heads} heads of {options.head_dim}, fp32; "
        "ms dense, ms gathered, gathered / dense\n"
        f"{'shared + routed active, share':32} {'forward':>24} {'forward + backward':>24} {'training step':>24}"
    )
    rows = [_row(options, shared, active) for shared, active in _routings(options.heads)]
    reporting.keep(options.out, "head_mixture.json", "head-mixture", arguments, {"rows": rows})
    return 1 if any(row["wrong"] for row in rows) else 0


def _routings(heads: int) -> list[tuple[int, int]]:
    """Returns (shared, active routed): all heads routed, at eighths of them; then a quarter of the heads shared and
    half of the others active."""
    shares = sorted({max(1, round(heads * eighth / 8)) for eighth in (1, 2, 3, 4, 6, 8)})
    shared = heads // 4
    return [(0, active) for active in shares] + [(shared, max(1, (heads - shared) // 2))]


def computed(form: str) -> contextlib.AbstractContextManager:
    """Returns the context in which traced layers compute every head ("dense") or what pays ("gathered")."""
    dense = mock.patch("recollect.layers.mixers.mixture_of_heads.skips", lambda *sizes, **more: False)
    return dense if form == "dense" else contextlib.nullcontext()


def _row(options: Namespace, shared: int, active: int) -> dict:
    """Compares and times both forms; prints the row and returns it."""
    config = MixtureOfHeads(heads=options.heads, shared=shared, active=active, head_dim=options.head_dim)
    calls = {form: _calls(config, options, form) for form in FORMS}
    row = {
        "shared": shared,
        "active": active,
        "heads": options.heads,
        "share": (shared + active) / options.heads,
        "length": options.length,
        "batch": options.batch,
        "head_dim": options.head_dim,
    }
    dense, gathered = (jax.tree.leaves(calls[form]["forward_backward"]()) for form in FORMS)
    # A router's gradient may be all but zero: rounding there is no error of the whole.
    row["error"] = max(kernel_case.relative_error(a, b, least=1e-8) for a, b in zip(gathered, dense, strict=True))
    row["wrong"] = not row["error"] <= CLOSE
    if row["wrong"]:
        result = f"WRONG: rms error {row['error']:.2e}"
    else:
        load = timing.OtherLoad()
        row |= {part: timing.time_in_turns({x: calls[x][part] for x in FORMS}, options.turns) for part in PARTS}
        row["cores_kept_busy_by_others"] = round(load.cores(), 2)
        result = " ".join(f"{_times(row[part]):>24}" for part in PARTS)
    print(f"{shared} + {active} of {options.heads}, {row['share']:.3f}".ljust(32), result, flush=True)
    return row


def _times(seconds: dict[str, float]) -> str:
    dense, gathered = (1e3 * seconds[form] for form in FORMS)
    return f"{dense:9.1f} {gathered:9.1f} {gathered / dense:.2f}"


def _calls(config: MixtureOfHeads, options: Namespace, form: str) -> dict:
    """Returns what is timed, by name: functions without arguments, compiled when first called."""
    width = options.heads * options.head_dim
    graph, weights = nnx.split(config.build(width, Place(0, 2), nnx.Rngs(params=jax.random.key(0))))
    x = jax.random.normal(jax.random.key(1), (options.batch, options.length, width))

    def forward(weights, x):
        with computed(form):
            return nnx.merge(graph, weights)(x).hidden

    def loss(weights, x):
        out = forward(weights, x)
        return jnp.mean(out * jnp.cos(jnp.arange(width, dtype=jnp.float32))), out

    run, with_gradients = jax.jit(forward), jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    return {
        "forward": lambda: run(weights, x),
        "forward_backward": lambda: with_gradients(weights, x),
        "training_step": _training_step(config, width, options, form),
    }


def _training_step(config: MixtureOfHeads, width: int, options: Namespace, form: str):
    """Returns the training step of a small model, which goes on from the parameters that it left and gives the loss."""
    mlp = SwiGLU() if options.mlp else None
    model = FunctionalModel(LanguageModel(width=width, stages=repeat(config, depth=2), mlp=mlp), VOCABULARY)
    optimizer = AdamW(schedule="constant")
    transform = optimizer.transform(model, 1000, optimizer.values())
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(2), (options.batch, options.length + 1), 0, VOCABULARY)

    def loss(params, tokens):
        module = model.bind(params)
        with computed(form):
            out = module.hidden(tokens[:, :-1])
        scores = jax.nn.log_softmax(module.logits(out.hidden), axis=-1)
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)) + sum(out.losses.values())

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        params, memory = state
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, memory = transform.update(gradients, memory, params)
        return (jax.tree.map(jnp.add, params, updates), memory), value

    kept = [(params, transform.init(params))]

    def train():
        kept[0], value = step(kept[0], tokens)
        return value

    return train
