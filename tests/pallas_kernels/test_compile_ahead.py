"""Compiling ahead of time: what is told of kernels, what is refused, and the quick TPU programs."""

import os
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from recollect.pallas_kernels import compile_ahead, compilers, dispatch
from tests.pallas_kernels.programs import CHIPS_OF, Program, all_programs

SHAPE = jax.ShapeDtypeStruct((256, 128), jnp.float32)


def _missing(compiler: compilers.Compiler) -> str | None:
    try:
        compilers.files(compiler)
    except compilers.NotInstalled as error:
        return str(error)
    return None


needs_libtpu = pytest.mark.skipif(_missing("tpu") is not None, reason=str(_missing("tpu")))
needs_cuda = pytest.mark.skipif(_missing("cuda") is not None, reason=str(_missing("cuda")))


def doubled(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    return pl.pallas_call(kernel, out_shape=x)(x)


def with_block_of_fifty(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    block = pl.BlockSpec((50, 50), lambda i: (i, 0))
    return pl.pallas_call(kernel, out_shape=x, grid=(5,), in_specs=[block], out_specs=block)(x)


@needs_libtpu
@pytest.mark.parametrize("chip", compile_ahead.TOPOLOGIES)
def test_a_tpu_kernel_compiles_and_a_bad_one_does_not(chip):
    report = compile_ahead.report(chip, doubled, SHAPE)
    assert report.chip == chip and report.complaints() == [] and report.kernels == ()
    assert "tpu_custom_call" in report.compiled.as_text()
    with pytest.raises(ValueError, match="block"):
        compile_ahead.report(chip, with_block_of_fifty, SHAPE)


@needs_libtpu
def test_a_program_without_a_kernel_is_no_proof():
    with pytest.raises(AssertionError, match="no kernel in what was lowered for v5e"):
        compile_ahead.report("v5e", lambda x: x * 2, SHAPE)
    assert compile_ahead.report("v5e", lambda x: x * 2, SHAPE, kernels=False).temporary_bytes == 0


@needs_libtpu
def test_each_chip_gets_what_was_chosen_for_it():
    """Also by helpers that are jitted, whose traces jax keeps."""
    seen = []

    @jax.jit
    def helper(x):
        seen.append(dispatch.device())
        return x + 1

    for chip in ("v5e", "v6e"):
        compile_ahead.report(chip, helper, SHAPE, kernels=False)
    helper(jnp.ones(SHAPE.shape))
    assert [(device.platform, device.kind) for device in seen] == [
        ("tpu", "TPU v5 lite"),
        ("tpu", "TPU v6 lite"),
        ("cpu", "cpu"),
    ]


@needs_libtpu
def test_an_unknown_slice():
    with pytest.raises(ValueError, match="libtpu knows no slice 'v5e:3x5'"):
        compile_ahead.tpu_slice("v5e:3x5")


@needs_cuda
def test_ptxas_tells_of_a_gpu_kernel():
    pytest.importorskip("absl", reason="jax's Mosaic GPU needs absl-py")
    from tests.pallas_kernels.toy_gpu_kernel import doubled_on_gpu

    (kernel,) = compile_ahead.report("h100", doubled_on_gpu, jax.ShapeDtypeStruct((1024,), jnp.float32)).kernels
    assert 0 < kernel.registers <= 255 and kernel.spill_stores == kernel.spill_loads == 0 and kernel.serialised == ()
    assert "doubling" in kernel.name
    with pytest.raises(AssertionError, match="no kernel"):
        compile_ahead.report("h100", lambda x: x * 2, SHAPE)


def test_a_gpu_kernel_lowers_for_cuda_without_a_compiler():
    pytest.importorskip("absl", reason="jax's Mosaic GPU needs absl-py")
    from tests.pallas_kernels.toy_gpu_kernel import doubled_on_gpu

    shape = jax.ShapeDtypeStruct((1024,), jnp.float32)
    assert "mosaic_gpu" in compile_ahead.lower_for_cuda(doubled_on_gpu, shape).as_text()
    with pytest.raises(AssertionError, match="no kernel"):
        compile_ahead.lower_for_cuda(lambda x: x * 2, shape)


PTXAS = """.visible .entry prepare_mosaic_gpu_kernel(
	ex2.approx.ftz.f32 %r134, %r135;
	rcp.approx.ftz.f32 %r136, %r134;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function 'walk_mosaic_gpu_kernel'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'walk_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for walk_mosaic_gpu_kernel
    512 bytes stack frame, 440 bytes spill stores, 628 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 512 bytes cumulative stack size
ptxas info    : Compiling entry function 'prepare_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for prepare_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 199 registers, used 2 barriers
"""


def test_spills_and_serialised_products_are_complaints():
    walk, prepare = compile_ahead._kernels(PTXAS)
    assert (walk.name, walk.registers, walk.spill_stores, walk.spill_loads, len(walk.serialised)) == (
        "walk",
        255,
        440,
        628,
        1,
    )
    assert prepare == compile_ahead.KernelReport("prepare", 199, 0, 0, special=2)
    assert walk.special == 0
    report = compile_ahead.Report("h100", 1.0, 0, (walk, prepare, prepare), None)
    spilled, serialised = report.complaints()
    assert spilled == "walk spills: 440 bytes stored, 628 bytes loaded" and "wgmma" in serialised
    assert "walk 255 registers, 440+628 bytes spilled; 2x prepare 199 registers" in report.line()
    assert Program("both", "pallas_gpu", jnp.sin, (), special=2).complaints(report) == report.complaints()
    *_, over = Program("both", "pallas_gpu", jnp.sin, (), special=1).complaints(
        compile_ahead.Report("h100", 1.0, 0, (walk, prepare), None)
    )
    assert over == "prepare holds 2 instructions for special functions, more than 1"
    with pytest.raises(ValueError, match="nothing known of odd"):
        list(compile_ahead._kernels("Compiling entry function 'odd' for 'sm_90a'\n"))


def test_what_cpp_prints_is_captured(capfd):
    with compile_ahead._captured() as said:
        os.write(1, b"from below\n")
        print("from above", file=sys.__stdout__, flush=True)
    assert said == ["from below\nfrom above\n"]
    assert "from" not in capfd.readouterr().out
    with pytest.raises(RuntimeError), compile_ahead._captured():
        os.write(2, b"its last words\n")
        raise RuntimeError
    assert "its last words" in capfd.readouterr().err


def test_lowering_has_a_time_limit():
    def endless(x):
        time.sleep(5)
        return x

    begun = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"not lowered within 0.2 s"):
        compile_ahead.lower_for_cuda(endless, SHAPE, limit=0.2)
    assert time.perf_counter() - begun < 4


def test_a_missing_compiler_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_LIBTPU", str(tmp_path))
    with pytest.raises(compilers.NotInstalled, match=f"libtpu is not in {tmp_path}: `make libtpu` installs it"):
        compile_ahead.tpu("v5e")
    monkeypatch.setenv("RECOLLECT_CUDA", str(tmp_path))
    with pytest.raises(compilers.NotInstalled, match=f"ptxas is not in {tmp_path}: `make cuda-compiler` installs it"):
        compile_ahead.h100.__wrapped__()
    with pytest.raises(ValueError, match="chip='v9': known are v5e, v5p, v6e, h100"):
        compile_ahead.device("v9")


def test_packages_are_those_of_this_jax():
    cuda = 12 if jax.version.__version_info__ < (0, 11) else 13
    assert f"jax-cuda{cuda}-pjrt=={jax.__version__}" in compilers.packages("cuda")
    (libtpu,) = compilers.packages("tpu")
    assert libtpu.startswith("libtpu==")
    assert compilers.folder("tpu").name == f"libtpu-{jax.__version__}" or "RECOLLECT_LIBTPU" in os.environ


@pytest.mark.parametrize(("cuda", "tools"), [(12, "cuda_nvcc"), (13, "cu13")])
def test_the_tools_of_both_cudas_are_found(cuda, tools, tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CUDA", str(tmp_path))
    names = (
        f"jax_plugins/xla_cuda{cuda}/xla_cuda_plugin.so",
        f"jax_cuda{cuda}_plugin/libmosaic_gpu_runtime.so",
        f"nvidia/{tools}/bin/ptxas",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert compilers.files("cuda") == [tmp_path / name for name in names]
    # Where XLA looks for libdevice.
    assert compile_ahead.compiler_options("gpu") == {"xla_gpu_cuda_data_dir": str(tmp_path / "nvidia" / tools)}


def test_an_install_that_fails_says_why(tmp_path, monkeypatch, capfd):
    for name, value in {
        "RECOLLECT_CUDA": str(tmp_path / "there"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert compilers.main(["cuda"]) == 1
    assert "could not be installed: ERROR: " in capfd.readouterr().err
    assert compilers.main(["cuda", "--optional"]) == 0
    assert "note: jax-cuda" in capfd.readouterr().err


def test_programs_are_complete():
    """Every program names a backend that has chips, and every operation with kernels has quick ones."""
    programs = all_programs()
    assert all(isinstance(program, Program) and program.backend in CHIPS_OF for program in programs)
    for operation in {program.name.split()[0] for program in programs}:
        for backend in {program.backend for program in programs if program.name.split()[0] == operation}:
            own = [
                program for program in programs if program.name.split()[0] == operation and program.backend == backend
            ]
            assert any(program.quick for program in own), f"{operation} has no quick program for {backend}"


QUICK = [
    pytest.param(
        program, chip, id=f"{program.name}, {chip}", marks=[] if chip == program.chips[0] else [pytest.mark.wide]
    )
    for program in all_programs(quick=True)
    if program.backend == "pallas_tpu"
    for chip in program.chips
]


@needs_libtpu
@pytest.mark.parametrize(("program", "chip"), QUICK)
def test_quick_tpu_programs_compile(program, chip):
    compile_ahead.report(chip, program.function, *program.arguments, limit=120)
