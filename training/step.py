"""The compiled functions of one program: initialise, train for several steps, evaluate.

A program serves every experiment that differs from its own in values only (learning rate, weight decay, betas, seed):
those are arguments. With `population` it trains that many members at once, stacked along a leading axis and vmapped.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.data.batch import Batch
from recollect.data.synthetics import shared_programs
from recollect.layers.mixer import MixerOutput
from recollect.models.functional import FunctionalModel, Params
from recollect.training.experiment import Experiment, program_of
from recollect.training.loss import losses
from recollect.training.sharding import batch_shardings, make_mesh, state_sharding

State = dict[str, Any]
"""Everything a run's future depends on, beside its config and data: {"params", "opt_state", "step" () int32, "seed" ()
uint32, "skipped": {"total", "in_row"} () int32}, and with `optimizer.ema` "ema", shaped like the parameters."""

Metrics = dict[str, jax.Array]


def evaluated(state: State) -> Params:
    """Returns the parameters that evaluation, samples and export use: the running average where there is one."""
    return state["ema"] if "ema" in state else state["params"]


class Program:
    """See the module. Public methods take and return stacked states when `population` is set."""

    def __init__(self, experiment: Experiment, population: int | None = None):
        self.experiment = experiment
        self.data: Any = experiment.data
        self.population = population
        self.model = FunctionalModel(experiment.model, experiment.data.vocabulary, experiment.optimizer.frozen)
        self.mesh = make_mesh(experiment.run.mesh) if experiment.run.mesh.devices > 1 else None
        self._compiled: dict[Any, Any] = {}

    def init(self, seeds: Any) -> State:
        """Returns a fresh state for a seed (or one for each of a population's seeds)."""
        seeds, function = as_uint32(seeds), self.vectorised(self._init)
        if self.mesh is not None:  # made sharded: no device ever holds the whole model
            shardings = state_sharding(jax.eval_shape(function, seeds), self.model.tags("dims"), self.mesh)
            return self.jit("init", function, out_shardings=shardings)(seeds)
        if isinstance(seeds, jax.core.Tracer):  # part of a larger program, whose options count
            return function(seeds)
        return self.jit("init", function, **_quick_to_compile())(seeds)

    def train(self, state: State, values: Any, steps: int, data_slice: Any) -> tuple[State, Metrics]:
        """Trains `steps` steps on batches drawn on the device from (seed, step); the state given is consumed. Returns
        the state, and metrics (steps,) by name ((members, steps) for a population)."""
        alone, size = len(self.data.train_slices()) == 1, self.experiment.run.batch_size
        group = (data_slice,) if alone else shared_programs.slices_like(self.data, data_slice)
        draws = [functools.partial(self.data.train_batch, slice=part, batch_size=size) for part in group]

        def member(index: jax.Array, state: State, values: Any) -> tuple[State, Metrics]:
            def body(state: State, _: None) -> tuple[State, Metrics]:
                return self.step(state, values, jax.lax.switch(index, draws, state["seed"], state["step"]))

            return jax.lax.scan(body, state, None, length=steps)

        def run(index: jax.Array, *args: Any) -> tuple[State, Metrics]:
            return self.vectorised(functools.partial(member, index))(*args)

        index = np.int32(group.index(data_slice))
        return self.jit(("train", steps, group), run, donate_argnums=1)(index, state, values)

    def step(self, state: State, values: Any, batch: Batch) -> tuple[State, Metrics]:
        """Takes one optimizer step (not jitted, not vmapped). Returns the state, and metrics: "loss", "accuracy",
        "gradient_norm", "skipped" (1.0 or 0.0), with a z-loss "z_loss", and the mixers' own.

        A step whose loss or gradient norm is not finite is skipped: parameters, average and optimizer stay what they
        were, `step` goes on. After `run.stop_after_nonfinite` such steps in a row all later ones are skipped too, so
        that the parameters stay those that fail.
        """
        optimizer, settings = self.experiment.optimizer, self.experiment.run
        if self.mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, batch_shardings(batch, self.mesh))
        grads, metrics = self.gradients(state["params"], batch, self.dropout_key(state["seed"], state["step"]))
        transform = optimizer.transform(self.model, settings.steps, values)
        updates, opt_state = transform.update(grads, state["opt_state"], state["params"])
        params = jax.tree.map(jnp.add, state["params"], updates)
        norm = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(grads)))
        in_row = state["skipped"]["in_row"]
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & (in_row < settings.stop_after_nonfinite)
        after = {"params": params, "opt_state": opt_state}
        if optimizer.ema is not None:
            after["ema"] = optimizer.averaged(state["ema"], params, state["step"])
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, {name: state[name] for name in after})
        skipped = {"total": state["skipped"]["total"] + ~good, "in_row": jnp.where(good, 0, in_row + 1)}
        metrics |= {"gradient_norm": norm, "skipped": 1.0 - good}
        return {**kept, "step": state["step"] + 1, "seed": state["seed"], "skipped": skipped}, metrics

    def dropout_key(self, seed: Any, step: Any) -> jax.Array | None:
        """Returns the key of a step's dropout; None for a model without any."""
        model = self.experiment.model
        drops = model.embedding_dropout or any(getattr(mixer, "dropout", 0) for mixer in model.mixers)
        return jax.random.fold_in(jax.random.key(seed), step) if drops else None

    def gradients(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[Params, Metrics]:
        """Returns the gradient of the mean loss over labelled positions plus auxiliary losses, and metrics; all of them
        the whole batch's, in however many pieces (`run.accumulate`) it is taken."""
        count, z_loss = self.experiment.run.accumulate, self.experiment.loss.z_loss
        weight = jnp.maximum(jnp.sum(batch.weights), 1.0)

        def loss_of(params: Params, part: Batch, key: jax.Array | None, whole: Any = None) -> tuple[jax.Array, Any]:
            entropy, out = self.losses_of(params, part, part.weights, key)
            auxiliary = out.losses if whole is None else whole.with_gradient_of(out.sums).formed()[0]
            metrics = {"loss": jnp.sum(entropy.loss * part.weights) / weight}
            metrics["accuracy"] = jnp.sum(entropy.correct * part.weights) / weight
            if z_loss:
                metrics["z_loss"] = z_loss * jnp.sum(entropy.lse**2 * part.weights) / weight
            return entropy.total / weight + sum(auxiliary.values(), jnp.zeros(())), (metrics, out.sums)

        gradient = jax.grad(loss_of, has_aux=True)
        if count == 1:
            grads, (metrics, sums) = gradient(params, batch, key)
        else:
            from recollect.training.accumulation import accumulated

            grads, (metrics, sums) = accumulated(self.model, gradient, params, batch, key, count)
        for values in () if sums is None else sums.formed():
            metrics |= values
        return grads, metrics

    def losses_of(self, params: Params, batch: Batch, weights: jax.Array, key: jax.Array | None = None) -> Any:
        """Returns the losses of a batch and the model's output; see `recollect.training.loss.losses`."""
        return losses(self.model.bind(params), batch, weights, self.experiment.loss, key)

    def measured(self, out: MixerOutput) -> dict[str, Any]:
        """Returns the (sum, count) by name that an evaluation reports of a batch beside its scores."""
        return {}

    def _init(self, seed: jax.Array) -> State:
        params, optimizer = self.model.init(jax.random.key(seed)), self.experiment.optimizer
        transform = optimizer.transform(self.model, self.experiment.run.steps, optimizer.values())
        zero = jnp.zeros((), jnp.int32)
        state: State = {"params": params, "opt_state": transform.init(params), "step": zero, "seed": seed}
        state["skipped"] = {"total": zero, "in_row": zero}
        if optimizer.ema is not None:  # a copy: a state is donated, and no array of it twice
            state["ema"] = jax.tree.map(jnp.copy, params)
        return state

    def vectorised(self, function: Any) -> Any:
        """Returns a function of one member's arguments for those of a population, stacked; itself for a lone run."""
        return function if self.population is None else jax.vmap(function)

    def jit(self, key: Any, function: Any, **options: Any) -> Any:
        """Returns `function` compiled for this program: once for each `key`."""
        compiled = self._compiled.setdefault(key, jax.jit(function, **options))

        def call(*args: Any) -> Any:
            with self.context():
                return compiled(*args)

        return call

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Sets what this program's functions are traced and run in: its precision, and its mesh, for operations that
        XLA cannot partition."""
        precision = "highest" if self.experiment.run.precision == "highest" else None
        mesh = None if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        with jax.default_matmul_precision(precision), mesh or contextlib.nullcontext():
            yield


@functools.lru_cache(maxsize=4)
def _program(experiment: Experiment, population: int | None) -> Program:
    if not experiment.run.carry_state:
        return Program(experiment, population)
    from recollect.training.carried_state import CarryingProgram

    return CarryingProgram(experiment, population)


def program_for(experiment: Experiment, population: int | None = None) -> Program:
    """Returns the program of `experiment`, built once for all experiments that differ in values only."""
    return _program(program_of(experiment), population)


def member_values(experiments: list[Experiment], population: bool) -> Any:
    """Returns the optimizer's values of one experiment, or of several stacked."""
    rows = [experiment.optimizer.values() for experiment in experiments]
    values = {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}
    return values if population else {name: array[0] for name, array in values.items()}


def _quick_to_compile() -> dict[str, Any]:
    """Returns jit's options for a program that runs once: on a CPU it compiles in half the time, with the same bits."""
    if jax.default_backend() != "cpu" or "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {"compiler_options": {"xla_backend_optimization_level": 1}}


def as_uint32(seeds: Any) -> Any:
    """Returns seeds as uint32, without compiling a conversion where they are numbers."""
    return seeds.astype(jnp.uint32) if isinstance(seeds, jax.Array) else np.asarray(seeds, np.uint32)
