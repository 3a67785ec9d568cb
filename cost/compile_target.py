"""Compiles training steps for devices that are not here: what they need and how fast they could be.

    tpu:v5p:2x2x2   a slice of v5e, v5p or v6e, by libtpu, for the whole mesh that run.mesh asks for
    h100            one H100, by XLA's CUDA plugin and ptxas

The program is the one that training runs: `Program.step` under the same mesh and shardings, the state donated. Times
are not measured: they follow from what the program does and the data sheets' peaks, and, on TPUs, from the compiler's
estimates. On a GPU XLA chooses between matrix products by timing them; compiled ahead of time it cannot, so memory and
traffic may differ a little from what runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recollect.configuration import UserError
from recollect.cost.hlo_cost import Work, work_of
from recollect.pallas_kernels import compile_ahead, compilers
from recollect.training.experiment import Experiment
from recollect.training.monitoring.chips import Chip, chip_of
from recollect.training.monitoring.model_flops import training_flops_per_token
from recollect.training.sharding import AXES, batch_shardings, state_sharding
from recollect.training.step import Program, member_values

_FORM = "the form is tpu:GENERATION:TOPOLOGY, for example tpu:v5e:2x2, or h100"
_DEFAULT_SHARE = 0.75
"""Of a GPU's memory, jax takes so much unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


def mesh_of(experiment: Experiment, target: str) -> jax.sharding.Mesh:
    """Returns the run's mesh on the compile-only devices of a target; a run of one device uses one of them.

    Raises:
      UserError: the target is none, its compiler is not here, or the run asks for more devices than it has.
    """
    parts = target.split(":")
    if target != "h100" and (len(parts) != 3 or parts[0] != "tpu"):
        raise UserError(f"--target {target!r}: {_FORM}")
    try:
        devices = [compile_ahead.h100()] if target == "h100" else compile_ahead.tpu_slice(":".join(parts[1:]))
    except (compilers.NotInstalled, ValueError) as error:
        raise UserError(f"--target {target!r}: {error}") from error
    config = experiment.run.mesh
    if config.devices > len(devices):
        raise UserError(f"run.mesh asks for {config.devices} devices; the target has {len(devices)}")
    grid = np.array(devices[: config.devices]).reshape([getattr(config, axis) for axis in AXES])
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compile_step(
    experiment: Experiment, program: Program, mesh: jax.sharding.Mesh
) -> tuple[Any, tuple[compile_ahead.KernelReport, ...]]:
    """Returns the training step compiled for a mesh of compile-only devices, and ptxas's report of each GPU kernel.

    Call it inside `compile_ahead.aimed_at_devices(mesh)`; `program` gets the mesh.
    """
    state = jax.eval_shape(program.init, 0)
    program.mesh = mesh if mesh.size > 1 else None
    batch = experiment.data.batch_shapes(experiment.run.batch_size)
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = (
        _place(state, state_sharding(state, program.model.tags("dims"), mesh)),
        {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for name in member_values([experiment], False)},
        _place(batch, batch_shardings(batch, mesh)),
    )
    with program.context():
        lowered = jax.jit(program.step, donate_argnums=0).lower(*arguments)
        return compile_ahead.finish(lowered, mesh.devices.flat[0].platform)


def report(
    experiment: Experiment, program: Program, mesh: jax.sharding.Mesh, target: str, log: Callable[[str], None]
) -> None:
    """Compiles the step and prints memory, products, traffic, collectives and times of one device."""
    begun = time.perf_counter()
    compiled, kernels = compile_step(experiment, program, mesh)
    chip = chip_of(mesh.devices.flat[0].device_kind)
    where = f"{target}, {mesh.size} devices" if mesh.size > 1 else target
    seconds = time.perf_counter() - begun
    log(f"training step of batch {experiment.run.batch_size} compiles for {where} ({seconds:.1f} s)")
    log("  memory per device: " + memory_line(compiled.memory_analysis(), chip))
    work = work_of(compiled.as_text())
    tokens = experiment.run.batch_size * experiment.data.longest
    model_flops = training_flops_per_token(experiment) * tokens / mesh.size
    times = [] if chip is None else time_lines(work, model_flops, chip, tokens, mesh.size)
    for line in [*work_lines(work, model_flops), *times]:
        log("  " + line)
    for kernel in kernels:
        if kernel.spill_stores or kernel.spill_loads:
            log(
                f"  kernel {kernel.name} spills registers: "
                f"{kernel.spill_stores} bytes stored, {kernel.spill_loads} loaded"
            )


def memory_line(memory: Any, chip: Chip | None) -> str:
    """Arguments (state and batch), temporaries and outputs, their sum, and whether the chip holds it."""
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs kept apart": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    if memory.generated_code_size_in_bytes:
        parts["code"] = memory.generated_code_size_in_bytes
    total = sum(parts.values())
    shown = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items()) + f"; together {total / 2**30:,.2f} GiB"
    if chip is None:
        return shown
    verdict = f"does not fit, it lacks {(total - chip.memory) / 2**30:,.2f} GiB"
    if total <= chip.memory:
        verdict = "fits"
        if chip.name.startswith(("H", "A", "B", "G", "L")) and total > _DEFAULT_SHARE * chip.memory:
            verdict = f"fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (jax takes {_DEFAULT_SHARE:.0%} by itself)"
    return f"{shown} of the {chip.memory / 2**30:,.1f} GiB of a {chip.name}: {verdict}"


def work_lines(work: Work, model_flops: float) -> list[str]:
    """Describes products, bytes and collectives per device and step; `model_flops` is three times the forward FLOPs."""
    silent = (
        f" beside {work.silent_kernels:,.0f} calls of kernels that do not report theirs" if work.silent_kernels else ""
    )
    lines = [
        f"products: {work.products / 1e12:,.3f} TFLOP{silent}; "
        f"the model's own (3 x forward) {model_flops / 1e12:,.3f} TFLOP",
        f"main memory read and written: {work.bytes / 2**30:,.2f} GiB",
    ]
    if work.unknown_loops:
        lines.append(f"{work.unknown_loops:,.0f} loops of unknown length are counted as one turn")
    lines.append("collectives" if work.collectives else "collectives: none")
    return lines + [
        f"  {kind:20}{traffic.calls:>8,.0f} calls {_mib(traffic.bytes):>16}, {_mib(traffic.sent)} sent as rings"
        for kind, traffic in work.collectives.items()
    ]


def time_lines(work: Work, model_flops: float, chip: Chip, tokens: int, devices: int) -> list[str]:
    """What the data sheet's peaks allow, and the compiler's estimate where it gives one. Nothing here is measured."""
    parts = {"products": max(work.products, model_flops) / chip.flops, "main memory": work.bytes / chip.bandwidth}
    sent = sum(traffic.sent for traffic in work.collectives.values())
    if chip.link and sent:
        parts["links"] = sent / chip.link
    longest = max(parts, key=lambda name: parts[name])
    seconds = parts[longest]
    shown = ", ".join(f"{name} {_time(value)}" for name, value in parts.items())
    lines = [
        f"roofline (data-sheet peaks, not measured): {shown}",
        f"  bound by {longest}: {_time(seconds)} per step, {tokens / seconds:,.0f} tokens/s "
        f"on {devices} device{'s' if devices > 1 else ''}, "
        f"MFU {model_flops / seconds / chip.flops:.0%}",
    ]
    if work.cycles and chip.clock:
        lines.append(
            f"the compiler's estimate: {_time(work.cycles / chip.clock)} "
            f"({work.cycles:,.0f} cycles at {chip.clock / 1e9:g} GHz; kernels and collectives are not in it)"
        )
    return lines


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.2f} ms"


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )
