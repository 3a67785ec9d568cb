"""Compiles for TPUs and for an H100 on a machine that has neither, by the compilers those devices use: libtpu, and
XLA's CUDA plugin with ptxas.

One function, for one chip (v5e, v5p, v6e, h100), from Python:

    shape = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    report = compile_ahead.report("h100", function, shape, shape)
    print(report.line())                     # seconds, temporary memory, and of each GPU kernel: registers, spilled
      bytes
    assert not report.complaints()

and from a shell, where `programs()` in FILE.py returns such (name, function, arguments) triples:

    python -m recollect.pallas_kernels.compile_ahead FILE.py [--chip h100] [--only PART_OF_NAME]

`make libtpu` and `make cuda-compiler` install the compilers (see compilers.py); importing this starts none of them.
What compiles need not run: values are proven by interpreting kernels, speed by measuring on a device.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import os
import re
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from recollect.pallas_kernels import compilers, dispatch
from recollect.pallas_kernels.compilers import NotInstalled as NotInstalled

# The topologies are the smallest that libtpu makes of each generation.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CHIPS = (*TOPOLOGIES, "h100")

# NVIDIA's published numbers of the H100 SXM, as XLA's GpuTargetConfigProto. ACCELERATED_FEATURES selects sm_90a, which
# wgmma needs.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }
"""


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What ptxas says of one GPU kernel: registers per thread, bytes spilled, and its warnings that wgmma are
    serialised; and how many instructions in its PTX are for special functions: exponentials, reciprocals and the like,
    a quarter or less as fast as others."""

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    serialised: tuple[str, ...] = ()
    special: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """One function compiled for one chip. temporary_bytes: device memory beside arguments and results."""

    chip: str
    seconds: float
    temporary_bytes: int
    kernels: tuple[KernelReport, ...]
    compiled: Any = dataclasses.field(repr=False, compare=False)

    def complaints(self) -> list[str]:
        """Returns what a tuned kernel must not do: spill registers, or wait for each wgmma."""
        complaints = []
        for kernel in self.kernels:
            if kernel.spill_stores or kernel.spill_loads:
                complaints.append(
                    f"{kernel.name} spills: {kernel.spill_stores} bytes stored, {kernel.spill_loads} bytes loaded"
                )
            complaints += [f"{kernel.name}: {warning}" for warning in kernel.serialised]
        return complaints

    def line(self) -> str:
        """Seconds, temporary memory and kernels, for one line of a table."""
        kernels = "; ".join(
            (f"{times}x " if times > 1 else "")
            + f"{kernel.name} {kernel.registers} registers, {kernel.spill_stores}+{kernel.spill_loads} bytes spilled"
            for kernel, times in collections.Counter(self.kernels).items()
        )
        return f"{self.chip:4} {self.seconds:5.1f} s {self.temporary_bytes / 2**20:8.1f} MiB  {kernels}".rstrip()


def tpu(generation: str) -> jax.Device:
    """Returns a device of a TPU generation ("v5e", "v5p", "v6e") that can be compiled for only."""
    return tpu_slice(TOPOLOGIES[generation])[0]


def tpu_slice(topology: str) -> Sequence[jax.Device]:
    """Returns the devices of a slice ("v5e:2x2") that can be compiled for only.

    Raises:
      NotInstalled: no libtpu here.
      ValueError: libtpu knows no such slice.
    """
    from jax.experimental import topologies

    # libtpu asks a metadata server, which only Google's machines have, for settings that are given here.
    settings = {
        "TPU_LIBRARY_PATH": str(compilers.files("tpu")[0]),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it locks a file against a second process, which only devices need
    }
    with _environment(settings):
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"libtpu knows no slice {topology!r}: {str(error).splitlines()[0][:160]}") from error


@functools.cache
def h100() -> jax.Device:
    """Returns an H100 that can be compiled for only.

    Raises:
      NotInstalled: no CUDA plugin of this jax version here, or no ptxas.
    """
    # Internal names, the same in jax 0.10.2 and 0.11.2: the public function passes no description of the device.
    from jax._src.lib import xla_client

    library, runtime, _ = compilers.files("cuda")
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(runtime)
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    with _captured():  # it says at length that there is no driver
        plugin = xla_client.load_pjrt_plugin_dynamically("cuda", str(library))
        xla_client.initialize_pjrt_plugin("cuda")
        topology = xla_client.make_c_api_device_topology(plugin, "h100", target_config=_H100, topology="1x1x1")
    compile_only: Any = topology  # the class is not exported
    return compile_only._make_compile_only_devices()[0]


def device(chip: str) -> jax.Device:
    """Returns the compile-only device of one of CHIPS.

    Raises:
      NotInstalled: its compiler is not here.
      ValueError: no such chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r}: known are {', '.join(CHIPS)}")
    return h100() if chip == "h100" else tpu(chip)


def lower_for(target: jax.Device, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns function, traced and lowered for a compile-only device with its kernels chosen for it. arguments: trees
    of ShapeDtypeStruct."""
    placement = jax.sharding.SingleDeviceSharding(target)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), arguments)
    mesh = jax.sharding.Mesh(np.array([target]), ("chip",), axis_types=(jax.sharding.AxisType.Auto,))
    with aimed_at_devices(mesh):
        return jax.jit(function).trace(*placed).lower()


@contextlib.contextmanager
def aimed_at_devices(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Programs traced and lowered inside are for a mesh of compile-only devices.

    The mesh is the ambient one, in its abstract form: Pallas asks it which TPU it lowers for, and asks the machine's
    own device otherwise.
    """
    target = mesh.devices.flat[0]
    with (
        dispatch.aimed_at(target.platform, target.device_kind),
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    ):
        yield


def finish(lowered: Any, platform: str) -> tuple[Any, tuple[KernelReport, ...]]:
    """Compiles what was lowered for a compile-only device of this platform ("tpu" or "gpu"); and what ptxas said of
    its GPU kernels."""
    with _captured() as said:
        compiled = lowered.compile(compiler_options=compiler_options(platform))
    return compiled, tuple(_kernels(said[0])) if platform == "gpu" else ()


def compiler_options(platform: str) -> dict[str, str]:
    """Returns what `.compile()` of a program lowered for a compile-only device must be given."""
    return {"xla_gpu_cuda_data_dir": str(compilers.files("cuda")[2].parents[1])} if platform == "gpu" else {}


def report(
    chip: str, function: Callable[..., Any], *arguments: Any, kernels: bool = True, limit: float = 120
) -> Report:
    """Compiles a function for a chip and reports what that took.

    Args:
      arguments: trees of ShapeDtypeStruct.
      kernels: whether it must hold a Pallas kernel.
      limit: seconds after which tracing or lowering is abandoned (layout inference of GPU kernels may not end).

    Raises:
      NotInstalled: the chip's compiler is not here.
      TimeoutError: the limit passed.
      AssertionError: there is no kernel in what was lowered, so something else served.
      Whatever lowering or compiling raises.
    """
    target = device(chip)
    begun = time.perf_counter()
    with _limited(limit):
        lowered = lower_for(target, function, *arguments)
    if kernels and not re.search(r"tpu_custom_call|mosaic_gpu", lowered.as_text()):
        raise AssertionError(f"no kernel in what was lowered for {chip}")
    compiled, kernel_reports = finish(lowered, target.platform)
    memory = compiled.memory_analysis()
    if kernels and target.platform == "gpu" and not kernel_reports:
        raise AssertionError("ptxas reported no kernel")
    return Report(
        chip, time.perf_counter() - begun, memory.temp_size_in_bytes if memory else 0, kernel_reports, compiled
    )


def lower_for_cuda(function: Callable[..., Any], *arguments: Any, limit: float = 60) -> Any:
    """Returns function, lowered for an H100 without the CUDA plugin: checks layouts and shared memory, not registers.

    Raises:
      TimeoutError, AssertionError: as `report`.
      Whatever lowering raises.
    """
    with _limited(limit), dispatch.aimed_at("gpu", "NVIDIA H100 80GB HBM3"):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    if "mosaic_gpu" not in lowered.as_text():
        raise AssertionError("no kernel in what was lowered for CUDA")
    return lowered


def _kernels(text: str) -> Iterator[KernelReport]:
    """Returns the kernels of ptxas' verbose output; a kernel's warnings may come before or after its numbers, so they
    are looked for by name.

    So is the PTX of those whose PTX comes with it.
    """
    sources = re.split(r"\.entry ([^\s(]+)\(", text)[1:]
    special = {name: len(_SPECIAL.findall(source)) for name, source in zip(sources[::2], sources[1::2], strict=True)}
    serialised = [line.strip() for line in text.splitlines() if "wgmma" in line and "serializ" in line]
    parts = re.split(r"Compiling entry function '([^']+)'", text)[1:]
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", body)
        registers = re.search(r"Used (\d+) registers", body)
        if spills is None or registers is None:
            raise ValueError(f"ptxas says nothing known of {name}: {body[:300]}")
        warnings = tuple(line for line in serialised if f"'{name}'" in line or len(parts) == 2)
        stored, loaded = int(spills[1]), int(spills[2])
        yield KernelReport(
            name.removesuffix("_mosaic_gpu_kernel"), int(registers[1]), stored, loaded, warnings, special.get(name, 0)
        )


_SPECIAL = re.compile(r"\b(?:ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\.approx")


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Returns what is written to standard output and error inside, C++ included; on an exception it is passed on to
    standard error."""
    said: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        except BaseException:
            sys.stdout.flush()
            file.seek(0)
            os.write(kept[1], file.read()[-20_000:])
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in zip((1, 2), kept, strict=True):
                os.dup2(original, number)
                os.close(original)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while; those that are set already stay as they are."""
    added = [name for name in settings if name not in os.environ]
    os.environ.update({name: settings[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise TimeoutError(f"not lowered within {seconds:g} s")

    former = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the command line: compiles what a file's `programs()` returns."""
    parser = argparse.ArgumentParser(prog="python -m recollect.pallas_kernels.compile_ahead", description=main.__doc__)
    parser.add_argument("file", help="a Python file whose programs() returns (name, function, arguments) triples")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="for these chips (default: all)")
    parser.add_argument("--only", default="", metavar="PART", help="programs whose name holds this")
    options = parser.parse_args(arguments)
    failed = 0
    for name, function, shapes in runpy.run_path(options.file)["programs"]():
        for chip in (options.chip or CHIPS) if options.only in name else ():
            try:
                result = report(chip, function, *shapes)
            except Exception as error:
                failed += 1
                print(f"{name:40} {chip:4} {type(error).__name__}: {error}", flush=True)
                continue
            failed += bool(result.complaints())
            print(f"{name:40} {result.line()}", *result.complaints(), sep="\n    ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
