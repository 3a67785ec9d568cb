"""What an experiment costs, told without data: parameters, FLOPs, state bytes, what serves its operations, whether its step compiles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configuration import UserError
from data.batch import Batch
from models.accounting import flops_per_token, parameters_by_part, state_bytes_at, state_elements_at
from pallas_kernels import compile_ahead, compilers, dispatch
from training.experiment import Experiment, Mesh
from training.operations import abstract_batch, operations_by_mixer
from training.program import Program, member_values
from training.sharding import AXES, batch_shardings, state_sharding

LENGTHS = (64, 256, 1024, 4096, 16384)


def describe(experiment: Experiment, *, target: str | None = None, say: Callable[[str], None] = print) -> None:
    """Prints the description.

    Args:
      target: None compiles here; "tpu:v5e:2x2" compiles ahead of time through libtpu for that slice.

    Raises:
      UserError: the target is unknown, or libtpu is not installed.
    """
    devices = None if target is None else _devices(target)
    # A target's devices are not here: the program gets its mesh when it is compiled.
    here = experiment if devices is None else chz.replace(experiment, run=chz.replace(experiment.run, mesh=Mesh()))
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
    batch = abstract_batch(experiment)
    mesh = None if devices is None else _target_mesh(experiment, devices)
    with contextlib.nullcontext() if mesh is None else compile_ahead.aimed_at_devices(mesh):
        say(f"operations on {dispatch.device().kind}")
        for line in operations_by_mixer(config, batch):
            say(f"  {line}")
        _compile(experiment, program, batch, mesh, target, say)


def _compile(
    experiment: Experiment, program: Program, batch: Batch, mesh: jax.sharding.Mesh | None, target: str | None, say: Callable[[str], None]
) -> None:
    begun = time.perf_counter()
    state = jax.eval_shape(program.init, 0)
    values = member_values([experiment], False)
    where = "here"
    if mesh is not None:
        where = f"for {target}"
        program.mesh = mesh if mesh.size > 1 else None
        state = _place(state, state_sharding(state, state["params"], mesh))
        batch = _place(batch, batch_shardings(batch, mesh))
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


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings)


def _target_mesh(experiment: Experiment, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The run's mesh on the target's devices; a run of one device uses one of them."""
    config = experiment.run.mesh
    if config.devices > len(devices):
        raise UserError(f"run.mesh asks for {config.devices} devices; the target has {len(devices)}")
    shape = tuple(getattr(config, axis) for axis in AXES)
    return jax.sharding.Mesh(np.array(devices[: config.devices]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _devices(target: str) -> Sequence[jax.Device]:
    parts = target.split(":")
    if len(parts) != 3 or parts[0] != "tpu":
        raise UserError(f"--target {target!r}: the form is tpu:GENERATION:TOPOLOGY, for example tpu:v5e:2x2")
    try:
        return compile_ahead.tpu_slice(f"{parts[1]}:{parts[2]}")
    except (compilers.NotInstalled, ValueError) as error:
        raise UserError(f"--target {target!r}: {error}") from error
