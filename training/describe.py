"""What an experiment costs, told without data: parameters, FLOPs, state bytes, and whether its training step compiles."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configuration import UserError
from data.batch import Batch
from models.accounting import flops_per_token, parameters_by_part, state_bytes_at, state_elements_at
from training.experiment import Experiment, Mesh
from training.program import Program, member_values
from training.sharding import AXES, batch_sharding, state_sharding

LENGTHS = (64, 256, 1024, 4096, 16384)


def describe(experiment: Experiment, *, target: str | None = None, say: Callable[[str], None] = print) -> None:
    """Prints the description.

    Args:
      target: None compiles here; "tpu:v5e:2x2" compiles ahead of time through libtpu for that slice.

    Raises:
      UserError: the target is unknown, or libtpu is not installed.
    """
    topology = None if target is None else _topology(target)
    # A target's devices are not here: the program gets its mesh when it is compiled.
    here = experiment if topology is None else chz.replace(experiment, run=chz.replace(experiment.run, mesh=Mesh()))
    program = Program(here)
    config = experiment.model
    say(f"{experiment.name}: width {config.width}, {len(config.mixers)} layers, vocabulary {experiment.data.vocabulary:,}, {config.dtype}")
    for index, mixer in enumerate(config.mixers):
        say(f"  layer {index}: {mixer}")
    say("parameters")
    for part, size in parameters_by_part(program.model).items():
        say(f"  {part:32} {size:>14,}")
    length = experiment.data.longest
    say(f"forward FLOPs a token at length {length:,}: {flops_per_token(program.model, length):,.0f}")
    say("decoding state of one sequence")
    limit = config.maximum_length()
    for at in sorted({length, *LENGTHS}):
        if limit is not None and at > limit:
            say(f"  {at:>8,} tokens: longer than this model's maximum of {limit:,}")
            continue
        size = state_bytes_at(config, experiment.data.vocabulary, [at])[str(at)]
        say(f"  {at:>8,} tokens: {size:>14,} bytes in {state_elements_at(config, experiment.data.vocabulary, at):,} elements")
    _compile(experiment, program, topology, target, say)


def _compile(experiment: Experiment, program: Program, topology: Any, target: str | None, say: Callable[[str], None]) -> None:
    begun = time.perf_counter()
    state = jax.eval_shape(program.init, 0)
    batch = _abstract_batch(experiment)
    values = member_values([experiment], False)
    where = "here"
    if topology is not None:
        where = f"for {target}"
        mesh = _target_mesh(experiment, topology)
        program.mesh = mesh if mesh.size > 1 else None
        state = _place(state, state_sharding(state, state["params"], mesh))
        rows = batch_sharding(mesh)
        batch = _place(batch, jax.tree.map(lambda _: rows, batch))
        whole = NamedSharding(mesh, PartitionSpec())
        values = {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for name in values}
    precision = "highest" if experiment.run.precision == "highest" else None
    with jax.default_matmul_precision(precision):
        compiled = jax.jit(program.step, donate_argnums=0).lower(state, values, batch).compile()
    memory = compiled.memory_analysis()
    seconds = time.perf_counter() - begun
    say(f"training step of batch {experiment.run.batch_size} compiles {where} ({seconds:.1f} s)")
    if memory is not None:
        parts = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs kept apart": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        }
        say("  memory a device: " + ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items()))


def _abstract_batch(experiment: Experiment) -> Batch:
    data: Any = experiment.data
    size = experiment.run.batch_size
    if hasattr(data, "train_batch"):
        longest = max(data.train_slices(), key=lambda part: part.length)
        return jax.eval_shape(lambda: data.train_batch(0, 0, longest, size))
    tokens: Any = jax.ShapeDtypeStruct((size, data.longest), jnp.int32)
    weights: Any = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    return Batch(tokens, tokens, None, weights, tokens)


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings)


def _target_mesh(experiment: Experiment, topology: Any) -> jax.sharding.Mesh:
    """The run's mesh on the target's devices; a run of one device uses one of them."""
    config = experiment.run.mesh
    if config.devices > len(topology.devices):
        raise UserError(f"run.mesh asks for {config.devices} devices; the target has {len(topology.devices)}")
    shape = tuple(getattr(config, axis) for axis in AXES)
    devices = np.array(topology.devices[: config.devices]).reshape(shape)
    return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _topology(target: str) -> Any:
    parts = target.split(":")
    if len(parts) != 3 or parts[0] != "tpu":
        raise UserError(f"--target {target!r}: the form is tpu:GENERATION:TOPOLOGY, for example tpu:v5e:2x2")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("--target tpu needs the package libtpu (pip install libtpu), which is not installed") from None
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{parts[1]}:{parts[2]}")
    except Exception as error:  # the plugin raises its own kinds
        raise UserError(f"--target {target!r}: libtpu knows no such slice ({str(error).splitlines()[0][:160]})") from error
