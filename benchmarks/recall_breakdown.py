"""Where the time of a recall training step goes: its pieces, each compiled alone and timed over a scan of 20 steps.

A step is data, forward and backward, optimizer. Forward and backward are split by leaving something out and taking the
difference: the embedding's dropout; the vocabulary, put at the smallest that the task allows (what is left is head and
loss); the layers are the rest, less the embedding's lookup and its gradient, which are timed alone.

Easy to get wrong: XLA moves what does not change out of a scan and drops what nobody reads, so every piece here depends
on its carry or its step, and everything it makes is read. Pieces run alone overlap differently: they need not add up to
the step.
"""

import chz
import jax
import jax.numpy as jnp

from recollect.benchmarks.timing import time_in_turns
from recollect.training import Program, member_values

STEPS = 20
TINY = 1e-6
"""Length of the gradient step that makes the next iteration depend on this one."""


def breakdown(experiment, seconds: float) -> dict[str, float]:
    """Returns ms per step of each piece of `experiment`'s training step; a piece is repeated for about `seconds`."""
    small = chz.replace(experiment, data=chz.replace(experiment.data, vocab_size=experiment.data.longest + 2))
    program, small_program = Program(experiment), Program(small)
    pieces = {
        "whole step": whole_step(program),
        "data": data(program),
        "gradients": gradients(program, dropout=experiment.model.embedding_dropout > 0),
        "without dropout": gradients(program, dropout=False),
        "small vocabulary": gradients(small_program, dropout=False),
        "embedding": embedding(program),
        "optimizer": optimizer(program),
    }
    times = {name: 1e3 * value / STEPS for name, value in time_in_turns(pieces, seconds=seconds * len(pieces)).items()}
    return {
        "whole step": times["whole step"],
        "data": times["data"],
        "forward and backward": times["gradients"],
        "  embedding lookup and gradient": times["embedding"],
        "  dropout": times["gradients"] - times["without dropout"],
        "  layers": times["small vocabulary"] - times["embedding"],
        "  head and loss": times["without dropout"] - times["small vocabulary"],
        "optimizer": times["optimizer"],
    }


def breakdown_table(rows: dict[str, dict[str, float]]) -> str:
    """Returns one block per case, ms per step and share of the whole step."""
    lines = ["", "where our step's time goes, ms per step (share of the whole step)"]
    for case, row in rows.items():
        parts = [name for name in row if name not in ("whole step", "forward and backward")]
        lines.append(f"{case}: {max(parts, key=row.__getitem__).strip()} takes most")
        lines += [f"  {name:34}{value:9.2f}{value / row['whole step']:8.0%}" for name, value in row.items()]
    return "\n".join(lines)


def whole_step(program: Program):
    """Returns the step as training runs it, data included."""
    values, part = member_values([program.experiment], False), program.experiment.data.train_slices()[0]
    held = [program.init(0)]

    def call():
        held[0], metrics = program.train(held[0], values, STEPS, part)
        return held[0], metrics

    return call


def data(program: Program):
    """Returns the making of batches; every field is summed, so that all of it is made."""

    def body(total, step):
        return total + sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(_batch(program, step))), None

    return _scan(program, body, jnp.zeros(()), jnp.arange(STEPS))


def gradients(program: Program, dropout: bool):
    """Returns forward and backward on batches made before, with the metrics that a step gives, and one SGD step."""

    def body(params, inputs):
        step, batch = inputs
        key = jax.random.fold_in(jax.random.key(0), step) if dropout else None
        grads, metrics = program.gradients(params, batch, key)
        return _nudge(params, grads), metrics

    return _scan(program, body, program.init(0)["params"], (jnp.arange(STEPS), _batches(program)))


def embedding(program: Program):
    """Returns the lookup of the tokens, and the addition of the rows' gradients to the table's."""

    def body(table, inputs):
        vectors, backward = jax.vjp(lambda table: table[inputs[0]], table)
        return _nudge(table, backward(inputs[1])[0]), vectors

    tokens, table = _batches(program).tokens, program.init(0)["params"]["embedding"]
    cotangents = jax.random.normal(jax.random.key(1), (*tokens.shape, table.shape[1]))
    return _scan(program, body, table, (tokens, cotangents))


def optimizer(program: Program):
    """Returns the optimizer's update and the gradient's norm."""
    experiment, state = program.experiment, program.init(0)

    def body(carry, step, grads, values):
        params, opt_state = carry
        moved = jax.tree.map(lambda leaf: leaf + step * TINY, grads)
        transform = experiment.optimizer.transform(program.model, experiment.run.steps, values)
        updates, opt_state = transform.update(moved, opt_state, params)
        norm = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(moved)))
        return (jax.tree.map(jnp.add, params, updates), opt_state), norm

    grads = jax.tree.map(lambda leaf: leaf * TINY, state["params"])
    steps, values = jnp.arange(STEPS, dtype=jnp.float32), member_values([experiment], False)
    return _scan(program, body, (state["params"], state["opt_state"]), steps, grads, values)


def _batch(program: Program, step):
    experiment = program.experiment
    part = experiment.data.train_slices()[0]
    return experiment.data.train_batch(jnp.uint32(0), step, part, experiment.run.batch_size)


def _batches(program: Program):
    return jax.jit(lambda: jax.lax.map(lambda step: _batch(program, step), jnp.arange(STEPS)))()


def _nudge(params, grads):
    return jax.tree.map(lambda leaf, gradient: leaf - TINY * gradient, params, grads)


def _scan(program: Program, body, carry, inputs, *kept):
    """Returns the scan of body(carry, input, *kept), compiled with the matrix precision that the program's own calls
    have. Everything is an argument of the compiled function, so that XLA cannot compute with it beforehand."""

    @jax.jit
    def run(carry, inputs, kept):
        return jax.lax.scan(lambda carry, each: body(carry, each, *kept), carry, inputs)

    def call():
        with program.context():
            return run(carry, inputs, kept)

    return call
