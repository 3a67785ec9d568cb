"""What an experiment costs, without data: parameters, FLOPs, state bytes, backends, and whether its step compiles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import chz
import jax

from recollect.cost import compile_target
from recollect.data.batch import Batch
from recollect.models.accounting import parameters_by_part
from recollect.models.functional import state_bytes_at, state_elements_at
from recollect.pallas_kernels import compile_ahead, dispatch
from recollect.training.experiment import Experiment, Mesh
from recollect.training.monitoring.backends_used import operations_by_mixer
from recollect.training.monitoring.model_flops import training_flops_per_token
from recollect.training.step import Program, member_values

LENGTHS = (64, 256, 1024, 4096, 16384)


def describe(experiment: Experiment, *, target: str | None = None, log: Callable[[str], None] = print) -> None:
    """Prints the description.

    Args:
      target: None compiles here; "tpu:v5e:2x2" or "h100" compiles ahead of time for what is not here (see
        cost/compile_target.py).

    Raises:
      UserError: the target is unknown, its compiler is not installed, or it has fewer devices than run.mesh.
    """
    mesh = None if target is None else compile_target.mesh_of(experiment, target)
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
    length = experiment.data.longest
    log(f"forward FLOPs per token at length {length:,}: {training_flops_per_token(experiment) / 3:,.0f}")
    log("decoding state of one sequence")
    limit = config.maximum_length()
    for at in sorted({length, *LENGTHS}):
        if limit is not None and at > limit:
            log(f"  {at:>8,} tokens: longer than this model's maximum of {limit:,}")
            continue
        size = state_bytes_at(config, experiment.data.vocabulary, [at])[str(at)]
        elements = state_elements_at(config, experiment.data.vocabulary, at)
        log(f"  {at:>8,} tokens: {size:>14,} bytes in {elements:,} elements")
    batch = experiment.data.batch_shapes(experiment.run.batch_size)
    with contextlib.nullcontext() if mesh is None else compile_ahead.aimed_at_devices(mesh):
        log(f"operations on {dispatch.device().kind}")
        for line in operations_by_mixer(config, batch):
            log(f"  {line}")
        if mesh is None or target is None:
            _compile(experiment, program, batch, log)
        else:
            compile_target.report(experiment, program, mesh, target, log)


def _compile(experiment: Experiment, program: Program, batch: Batch, log: Callable[[str], None]) -> None:
    begun = time.perf_counter()
    state = jax.eval_shape(program.init, 0)
    with program.context():
        lowered = jax.jit(program.step, donate_argnums=0).lower(state, member_values([experiment], False), batch)
        compiled = lowered.compile()
    log(f"training step of batch {experiment.run.batch_size} compiles here ({time.perf_counter() - begun:.1f} s)")
    memory = compiled.memory_analysis()
    if memory is not None:
        log("  memory per device: " + compile_target.memory_line(memory, None))
