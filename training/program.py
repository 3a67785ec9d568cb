"""The compiled functions of one program: initialise, train for several steps, evaluate.

A program serves every experiment that differs from its own in values only (learning rate, weight decay, betas, seed): those are
arguments. With `population` it trains that many members at once, stacked along a leading axis and vmapped.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import Batch
from layers.mixer import Context
from models.functional import FunctionalModel, Params
from training.experiment import Experiment, program_of
from training.sharding import batch_sharding, make_mesh, state_sharding

State = dict[str, Any]
"""{"params", "opt_state", "step" () int32, "seed" () uint32}: everything a run's future depends on, beside its config and data."""


def program_for(experiment: Experiment, population: int | None = None) -> Program:
    """The program of `experiment`, built once for all experiments that differ in values only."""
    return _programs(program_of(experiment), population)


@functools.lru_cache(maxsize=4)
def _programs(experiment: Experiment, population: int | None) -> Program:
    return Program(experiment, population)


class Program:
    """See the module. Public methods take and return stacked states when `population` is set."""

    def __init__(self, experiment: Experiment, population: int | None = None):
        self.experiment = experiment
        self.data: Any = experiment.data
        self.population = population
        self.model = FunctionalModel(experiment.model, experiment.data.vocabulary)
        self.mesh = make_mesh(experiment.run.mesh) if experiment.run.mesh.devices > 1 else None
        self._compiled: dict[Any, Any] = {}

    def init(self, seeds: Any) -> State:
        """Fresh state for a seed (or one for each of a population's seeds)."""
        seeds = jnp.asarray(seeds, jnp.uint32)
        state = self._jit("init", self._vectorised(self._init))(seeds)
        if self.mesh is None:
            return state
        return jax.device_put(state, state_sharding(state, state["params"], self.mesh))

    def train(self, state: State, values: Any, steps: int, data_slice: Any) -> tuple[State, dict[str, jax.Array]]:
        """`steps` steps on batches made on the device from (seed, step); the state given is consumed.

        Returns:
          the state, and metrics (steps,) by name ((members, steps) for a population).
        """

        def run(state: State, values: Any) -> tuple[State, dict[str, jax.Array]]:
            def body(state: State, _: None) -> tuple[State, dict[str, jax.Array]]:
                batch = self.data.train_batch(state["seed"], state["step"], data_slice, self.experiment.run.batch_size)
                return self.step(state, values, batch)

            return jax.lax.scan(body, state, None, length=steps)

        return self._jit(("train", steps, data_slice), self._vectorised(run), donate_argnums=0)(state, values)

    def train_on(self, state: State, values: Any, batches: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step a batch; `batches` are stacked along a leading axis. The state given is consumed."""

        def run(state: State, values: Any, batches: Batch) -> tuple[State, dict[str, jax.Array]]:
            return jax.lax.scan(lambda state, batch: self.step(state, values, batch), state, batches)

        assert self.population is None, "host data feeds one member at a time"
        return self._jit("train_on", run, donate_argnums=0)(state, values, batches)

    def evaluate(self, params: Params, seeds: Any, examples: int, data_slice: Any) -> dict[str, jax.Array]:
        """Sums over `examples` evaluation examples of one slice: "loss", "correct", "weight" (per member)."""
        size = min(examples, self.experiment.run.batch_size)
        count = -(-examples // size)

        def run(params: Params, seed: jax.Array) -> dict[str, jax.Array]:
            def body(total: dict[str, jax.Array], index: jax.Array) -> tuple[dict[str, jax.Array], None]:
                batch = self.data.evaluation_batch(seed, index, data_slice, size)
                inside = (index * size + jnp.arange(size)) < examples
                sums = self.sums(params, batch, batch.weights * inside[:, None])
                return jax.tree.map(jnp.add, total, sums), None

            zero = {name: jnp.zeros(()) for name in ("loss", "correct", "weight")}
            return jax.lax.scan(body, zero, jnp.arange(count))[0]

        return self._jit(("evaluate", examples, data_slice), self._vectorised(run))(params, jnp.asarray(seeds, jnp.uint32))

    def evaluate_on(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Per-target results on one host batch: "loss" (b, p) nats, "correct" (b, p) bool."""

        def run(params: Params, batch: Batch) -> dict[str, jax.Array]:
            loss, correct, _ = self._targets(params, batch, None)
            return {"loss": loss, "correct": correct}

        return self._jit("evaluate_on", run)(params, batch)

    def sums(self, params: Params, batch: Batch, weights: jax.Array) -> dict[str, jax.Array]:
        """Weighted sums of loss and correct answers."""
        loss, correct, _ = self._targets(params, batch, None)
        return {"loss": jnp.sum(loss * weights), "correct": jnp.sum(correct * weights), "weight": jnp.sum(weights)}

    def step(self, state: State, values: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One optimizer step (not jitted, not vmapped)."""
        experiment = self.experiment
        if self.mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding(self.mesh))
        key = jax.random.fold_in(jax.random.key(state["seed"]), state["step"])
        grads, metrics = self.gradients(state["params"], batch, key if experiment.model.embedding_dropout else None)
        transform = experiment.optimizer.transform(self.model, experiment.run.steps, values)
        updates, opt_state = transform.update(grads, state["opt_state"], state["params"])
        params = jax.tree.map(jnp.add, state["params"], updates)
        metrics["gradient_norm"] = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(grads)))
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1, "seed": state["seed"]}, metrics

    def gradients(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[Params, dict[str, jax.Array]]:
        """Gradient of the mean loss over labelled positions plus auxiliary losses, in `run.accumulate` pieces, and metrics."""
        pieces = self.experiment.run.accumulate
        weight = jnp.maximum(jnp.sum(batch.weights), 1.0)

        def loss_of(params: Params, piece: Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
            loss, correct, out = self._targets(params, piece, key)
            mean = jnp.sum(loss * piece.weights) / weight
            auxiliary = sum(out.losses.values(), jnp.zeros(())) / pieces
            metrics = {"loss": mean, "accuracy": jnp.sum(correct * piece.weights) / weight}
            metrics |= {name: value / pieces for name, value in {**out.losses, **out.metrics}.items()}
            return mean + auxiliary, metrics

        slope = jax.grad(loss_of, has_aux=True)
        if pieces == 1:
            return slope(params, batch, key)
        split = jax.tree.map(lambda leaf: leaf.reshape(pieces, -1, *leaf.shape[1:]), batch)
        keys = None if key is None else jax.random.split(key, pieces)

        def body(total: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, slope(params, *piece)), None

        first = slope(params, jax.tree.map(lambda leaf: leaf[0], split), None if keys is None else keys[0])
        rest = jax.tree.map(lambda leaf: leaf[1:], (split, keys))
        return jax.lax.scan(body, first, rest)[0]

    def _targets(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, Any]:
        """Cross-entropy (b, p) nats and correctness (b, p) at labelled positions, and the model's output.

        Only labelled positions are projected to the vocabulary.
        """
        module = self.model.bind(params)
        out = module.hidden(batch.tokens, Context(segments=batch.segments), key)
        hidden = out.hidden
        if batch.target_positions is not None:
            hidden = jnp.take_along_axis(hidden, batch.target_positions[..., None], axis=1)
        logits = module.logits(hidden)
        chosen = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - chosen
        # Right when no other logit is as large: argmax without its cost on a CPU, and ties (a collapsed model) count as wrong.
        correct = jnp.sum(logits >= chosen[..., None], axis=-1) == 1
        return loss, correct, out

    def _init(self, seed: jax.Array) -> State:
        params = self.model.init(jax.random.key(seed))
        optimizer = self.experiment.optimizer
        transform = optimizer.transform(self.model, self.experiment.run.steps, optimizer.values())
        return {"params": params, "opt_state": transform.init(params), "step": jnp.zeros((), jnp.int32), "seed": seed}

    def _vectorised(self, function: Any) -> Any:
        return function if self.population is None else jax.vmap(function)

    def _jit(self, key: Any, function: Any, **options: Any) -> Any:
        if key not in self._compiled:
            self._compiled[key] = jax.jit(function, **options)
        compiled = self._compiled[key]

        def call(*args: Any) -> Any:
            precision = "highest" if self.experiment.run.precision == "highest" else None
            # The mesh is told to those operations whose kernels XLA cannot partition.
            mesh = contextlib.nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
            with jax.default_matmul_precision(precision), mesh:
                return compiled(*args)

        return call


def member_values(experiments: list[Experiment], population: bool) -> Any:
    """The optimizer's values of one experiment, or of several stacked."""
    rows = [experiment.optimizer.values() for experiment in experiments]
    if not population:
        return {name: np.float32(value) for name, value in rows[0].items()}
    return {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}
