"""What an experiment costs, without data: parameters, FLOPs, state bytes, backends, and whether its step compiles:
here, or for devices that are not here, with what they need and how fast they could be.

    tpu:v5p:2x2x2   a slice of v5e, v5p or v6e, by libtpu, for the whole mesh that run.mesh asks for
    h100            one H100, by XLA's CUDA plugin and ptxas

The program is the one that training runs: `Program.step` under the same mesh and shardings, the state donated. Times
are not measured: they follow from what the program does and the data sheets' peaks, and, on TPUs, from the compiler's
estimates. On a GPU XLA chooses between matrix products by timing them; compiled ahead of time it cannot, so memory and
traffic may differ a little from what runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import chz
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recollect.configuration import UserError
from recollect.cost.hlo_cost import Work, work_of
from recollect.data.batch import Batch
from recollect.models import count, parameters_by_part, state_bytes, trainable_parameters
from recollect.pallas_kernels import compile_ahead, compilers, dispatch
from recollect.training.experiment import Experiment, Mesh
from recollect.training.monitoring.chips import Chip, chip_of
from recollect.training.monitoring.model_flops import training_flops_per_token
from recollect.training.monitoring.run_log import operations_by_mixer
from recollect.training.sharding import AXES, batch_shardings, state_sharding
from recollect.training.step import Program, member_values

_FORM = "the form is tpu:GENERATION:TOPOLOGY, for example tpu:v5e:2x2, or h100"
_DEFAULT_SHARE = 0.75
"""Of a GPU's memory, jax takes so much unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""
LENGTHS = (64, 256, 1024, 4096, 16384)


def describe(
    experiment: Experiment, *, target: str | None = None, compiled: bool = True, log: Callable[[str], None] = print
) -> None:
    """Prints the description.

    Args:
      target: None compiles here; "tpu:v5e:2x2" or "h100" compiles ahead of time for what is not here.
      compiled: whether the training step is compiled too, for its memory.

    Raises:
      UserError: the target is unknown, its compiler is not installed, or it has fewer devices than run.mesh.
    """
    mesh = None if target is None else mesh_of(experiment, target)
    # A target's devices are not here: the program gets its mesh when it is compiled.
    local = experiment if mesh is None else chz.replace(experiment, run=chz.replace(experiment.run, mesh=Mesh()))
    program = Program(local)
    config = experiment.model
    log(
        f"{experiment.name}: width {config.width}, {len(config.mixers)} layers, "
        f"vocabulary {experiment.data.vocabulary:,}, {config.dtype}"
    )
    for index, mixer in enumerate(config.mixers):
        log(f"  layer {index}: {mixer}")
    log("parameters")
    for part, size in parameters_by_part(program.model).items():
        log(f"  {part:32} {size:>14,}")
    log(f"  {'trainable':32} {trainable_parameters(program.model):>14,}")
    length, batch = experiment.data.longest, experiment.data.batch_shapes(experiment.run.batch_size)
    log(f"forward FLOPs per token at length {length:,}: {training_flops_per_token(experiment) / 3:,.0f}")
    if batch.fields is not None:
        from recollect.cost.masked_flops import describe_masks

        for line in describe_masks(experiment):
            log(f"  {line}")
    log("decoding state of one sequence")
    limit = config.maximum_length()
    stateless = [type(mixer).__name__ for mixer in config.mixers if not mixer.traits.streams]
    if stateless:
        log(f"  none: {stateless[0]} does not stream")
    for at in () if stateless else sorted({length, *LENGTHS}):
        if limit is not None and at > limit:
            log(f"  {at:>8,} tokens: longer than this model's maximum of {limit:,}")
            continue
        state = program.model.abstract_state(at)
        log(f"  {at:>8,} tokens: {state_bytes(state):>14,} bytes in {count(state):,} elements")
    with contextlib.nullcontext() if mesh is None else compile_ahead.aimed_at_devices(mesh):
        log(f"operations on {dispatch.device().kind}")
        for line in operations_by_mixer(config, batch):
            log(f"  {line}")
        if compiled:
            _report_compiled_step(program, batch, mesh, target, log)


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


def _report_compiled_step(
    program: Program, batch: Batch, mesh: jax.sharding.Mesh | None, target: str | None, log: Callable[[str], None]
) -> None:
    """Compiles the step and prints its memory; of a target also products, traffic, collectives and times of one device.

    Args:
      mesh: of the target's compile-only devices, whose `compile_ahead.aimed_at_devices` this is called in; None for the
        devices here.
    """
    experiment = program.experiment
    begun = time.perf_counter()
    compiled, kernels = _compile_step(program, batch, mesh)
    devices = 1 if mesh is None else mesh.size
    where = "here" if mesh is None else f"for {target}" + (f", {devices} devices" if devices > 1 else "")
    log(f"training step of batch {experiment.run.batch_size} compiles {where} ({time.perf_counter() - begun:.1f} s)")
    chip = None if mesh is None else chip_of(mesh.devices.flat[0].device_kind)
    memory = compiled.memory_analysis()
    if memory is not None:
        log("  memory per device: " + memory_line(memory, chip))
    if mesh is None:
        return
    work = work_of(compiled.as_text())
    tokens = experiment.run.batch_size * experiment.data.longest
    model_flops = training_flops_per_token(experiment) * tokens / devices
    times = [] if chip is None else time_lines(work, model_flops, chip, tokens, devices)
    for line in [*work_lines(work, model_flops), *times]:
        log("  " + line)
    for kernel in kernels:
        if kernel.spill_stores or kernel.spill_loads:
            log(
                f"  kernel {kernel.name} spills registers: "
                f"{kernel.spill_stores} bytes stored, {kernel.spill_loads} loaded"
            )


def _compile_step(
    program: Program, batch: Batch, mesh: jax.sharding.Mesh | None
) -> tuple[Any, tuple[compile_ahead.KernelReport, ...]]:
    """Returns the compiled training step, and of a target ptxas's report of each GPU kernel."""
    arguments = (jax.eval_shape(program.init, 0), member_values([program.experiment], False), batch)
    if mesh is not None:
        state, values, _ = arguments
        program.mesh = mesh if mesh.size > 1 else None
        shardings = (
            state_sharding(state, program.model.tags("dims"), mesh),
            dict.fromkeys(values, NamedSharding(mesh, PartitionSpec())),
            batch_shardings(batch, mesh),
        )
        arguments = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments, shardings
        )
    with program.context():
        lowered = jax.jit(program.step, donate_argnums=0).lower(*arguments)
        return (lowered.compile(), ()) if mesh is None else compile_ahead.finish(lowered, mesh.devices.flat[0].platform)


def memory_line(memory: Any, chip: Chip | None) -> str:
    """Arguments (state and batch), temporaries and outputs, their sum, and whether the chip holds it."""
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs kept apart": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(parts.values())
    listed = [f"{name} {_mib(size)}" for name, size in parts.items() if size or name != "code"]
    shown = ", ".join(listed) + f"; together {total / 2**30:,.2f} GiB"
    if chip is None:
        return shown
    verdict = "fits"
    if total > chip.memory:
        verdict = f"does not fit, it lacks {(total - chip.memory) / 2**30:,.2f} GiB"
    elif chip.name.startswith(("H", "A", "B", "G", "L")) and total > _DEFAULT_SHARE * chip.memory:
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
