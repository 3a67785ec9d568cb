"""Where the time of a recall training step goes: its pieces, each compiled alone and timed over a scan of 20 steps.

A step is data, forward and backward, optimizer. Forward and backward are split by leaving something out and taking the
difference: the embedding's dropout; the vocabulary, put at the smallest that the task allows (what is left is head and
loss); the layers are the rest, less the embedding's lookup and its gradient, which are timed alone.

Easy to get wrong: XLA moves what does not change out of a scan and drops what nobody reads, so every piece here depends
on its carry or its step, and everything it makes is read. Pieces run alone overlap differently: they need not add up to
the step.
"""

import functools
from collections.abc import Callable
from typing import Any

import chz
import jax
import jax.numpy as jnp

from recollect.benchmarks.timing import time_in_turns
from recollect.training.step import Program, member_values

STEPS = 20
TINY = 1e-6
"""Length of the gradient step that makes the next iteration depend on this one."""

Piece = Callable[[], Any]


def breakdown(experiment: Any, seconds: float) -> dict[str, float]:
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


def whole_step(program: Program) -> Piece:
    experiment = program.experiment
    values, part = member_values([experiment], False), experiment.data.train_slices()[0]
    held = [program.init(0)]

    def call() -> Any:
        held[0], metrics = program.train(held[0], values, STEPS, part)
        return held[0], metrics

    return call


def data(program: Program) -> Piece:
    """Returns the making of batches; every field is summed, so that all of it is made."""

    def run(seed: jax.Array) -> jax.Array:
        def body(total: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
            batch = _batch(program, seed, step)
            return total + sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(batch)), None

        return jax.lax.scan(body, jnp.zeros(()), jnp.arange(STEPS))[0]

    return functools.partial(_compile(program, run), jnp.uint32(0))


def gradients(program: Program, dropout: bool) -> Piece:
    """Returns forward and backward on batches made before, with the metrics that a step gives, and one SGD step."""

    def run(params: Any, batches: Any) -> Any:
        def body(params: Any, inputs: Any) -> Any:
            step, batch = inputs
            key = jax.random.fold_in(jax.random.key(0), step) if dropout else None
            grads, metrics = program.gradients(params, batch, key)
            return _nudge(params, grads), metrics

        return jax.lax.scan(body, params, (jnp.arange(STEPS), batches))

    return functools.partial(_compile(program, run), program.init(0)["params"], _batches(program))


def embedding(program: Program) -> Piece:
    """Returns the lookup of the tokens, and the addition of the rows' gradients to the table's."""

    def run(table: jax.Array, tokens: jax.Array, cotangents: jax.Array) -> Any:
        def body(table: jax.Array, inputs: Any) -> Any:
            vectors, backward = jax.vjp(lambda table: table[inputs[0]], table)
            return _nudge(table, backward(inputs[1])[0]), vectors

        return jax.lax.scan(body, table, (tokens, cotangents))

    tokens, table = _batches(program).tokens, program.init(0)["params"]["embedding"]
    cotangents = jax.random.normal(jax.random.key(1), (*tokens.shape, table.shape[1]))
    return functools.partial(_compile(program, run), table, tokens, cotangents)


def optimizer(program: Program) -> Piece:
    """Returns the optimizer's update and the gradient's norm."""
    experiment = program.experiment
    values = member_values([experiment], False)

    def run(state: Any, grads: Any, values: Any) -> Any:
        transform = experiment.optimizer.transform(program.model, experiment.run.steps, values)

        def body(carry: Any, step: jax.Array) -> Any:
            params, opt_state = carry
            moved = jax.tree.map(lambda leaf: leaf + step * TINY, grads)
            updates, opt_state = transform.update(moved, opt_state, params)
            norm = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(moved)))
            return (jax.tree.map(jnp.add, params, updates), opt_state), norm

        return jax.lax.scan(body, (state["params"], state["opt_state"]), jnp.arange(STEPS, dtype=jnp.float32))

    state = program.init(0)
    return functools.partial(
        _compile(program, run), state, jax.tree.map(lambda leaf: leaf * TINY, state["params"]), values
    )


def _batch(program: Program, seed: Any, step: Any) -> Any:
    experiment = program.experiment
    return experiment.data.train_batch(seed, step, experiment.data.train_slices()[0], experiment.run.batch_size)


def _batches(program: Program) -> Any:
    return jax.jit(lambda: jax.lax.map(lambda step: _batch(program, jnp.uint32(0), step), jnp.arange(STEPS)))()


def _nudge(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda leaf, gradient: leaf - TINY * gradient, params, grads)


def _compile(program: Program, function: Any) -> Any:
    """Returns the function jitted, with the matrix precision that the program's own calls have."""
    compiled = jax.jit(function)

    def call(*arguments: Any) -> Any:
        with program.context():
            return compiled(*arguments)

    return call
