"""What a compiled program does, counted from its text: against products by hand, loops, collectives of eight fake
devices, and lines as TPU and GPU compilers write them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recollect.cost.describe import memory_line, time_lines, work_lines
from recollect.cost.hlo_cost import Traffic, Work, work_of
from recollect.cost.hlo_parser import bytes_of
from recollect.training.monitoring.chips import chip_of


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def array(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def test_products_of_loops_count_as_often_as_they_run():
    def function(x, weights):
        def inner(x, w):
            x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)
            return x, None

        return jax.lax.scan(inner, x, weights)[0]

    work = work_of(compiled(function, array(8, 16), array(5, 16, 16)))
    assert work.products == 5 * 3 * 2 * 8 * 16 * 16
    assert work.unknown_loops == 0 and work.collectives == {} and work.cycles == 0


def test_bytes_of_a_slice_are_the_slices():
    """Each turn reads one row of 64 KiB, not all hundred of them."""

    def function(x, rows):
        return jax.lax.scan(lambda x, row: (jnp.sin(x) + row, None), x, rows)[0]

    work = work_of(compiled(function, array(16384), array(100, 16384)))
    assert 100 * 3 * 65536 <= work.bytes < 100 * 8 * 65536


def test_collectives_of_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def function(x, w):
        def body(w, _):
            return w - jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w), None

        return jax.lax.scan(body, w, None, length=7)[0]

    work = work_of(compiled(function, array(64, 32, sharding=rows), array(32, 4, sharding=whole)))
    size = 7 * 32 * 4 * 4
    assert work.collectives == {"all-reduce": Traffic(7, size, 2 * 7 / 8 * size)}
    assert work.products == 7 * 2 * (2 * 8 * 32 * 4)  # a device's rows, forwards and backwards


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2},{1,3}}", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", 2),
    ],
)
def test_groups_of_devices(groups, size):
    line = f"  ROOT %r = f32[10]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    text = "HloModule m\n\nENTRY %main (x: f32[10]) -> f32[10] {\n  %x = f32[10]{0} parameter(0)\n" + line + "\n}\n"
    assert work_of(text).collectives == {"all-reduce": Traffic(1, 40, pytest.approx(2 * (size - 1) / size * 40))}


TPU = """HloModule m, is_scheduled=true

%fused (p0: f32[10,4,8], p1: s32[]) -> f32[4,8] {
  %p0 = f32[10,4,8]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %slice = f32[1,4,8]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,4,8}
  ROOT %flat = f32[4,8]{1,0} bitcast(%slice)
}

%all-reduce-scatter.1 (q: f32[8,8]) -> f32[4,8] {
  %q = f32[8,8]{1,0} parameter(0)
  %sum = f32[8,8]{1,0} all-reduce(%q), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %cut = f32[4,8]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={4,8}
}

%condition (s: (s32[], f32[10,4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(10)
  %s = (s32[]{:T(128)}, f32[10,4,8]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (t: (s32[], f32[10,4,8])) -> (s32[], f32[10,4,8]) {
  %t = (s32[]{:T(128)}, f32[10,4,8]{2,1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%t), index=0
  %all = f32[10,4,8]{2,1,0} get-tuple-element(%t), index=1
  %one = f32[4,8]{1,0:S(1)} fusion(%all, %j), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %kernel = f32[4,8]{1,0} custom-call(%one), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"500"}}}
  ROOT %next = (s32[]{:T(128)}, f32[10,4,8]{2,1,0}) tuple(%j, /*index=1*/%all)
}

ENTRY %main (x: f32[10,4,8], y: f32[8,8]) -> f32[8,8] {
  %x = f32[10,4,8]{2,1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[10,4,8]{2,1,0}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, f32[10,4,8]{2,1,0}) while(%start), condition=%condition, body=%body
  %part = f32[4,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %silent = f32[4,8]{1,0} custom-call(%part), custom_call_target="mosaic_gpu_v2", backend_config={}
  %gathering = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%part), replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %gathered = f32[8,8]{1,0} all-gather-done(%gathering)
}
"""


def test_lines_as_compilers_write_them():
    work = work_of(TPU)
    assert work.products == 10 * 500 and work.cycles == 10 * 100 and work.silent_kernels == 1
    assert work.collectives == {"all-gather": Traffic(1, 256, 128), "reduce-scatter": Traffic(1, 256, 128)}
    # Turns: a slice of 128 bytes and a place of 4 read, the result in fast memory; the kernel writes 128.
    entry = (256 + 128) + (128 + 128) + (128 + 128 + 256)
    assert work.bytes == 10 * (128 + 4 + 128 + 1) + 10 * 8 + entry


GPU = """HloModule m, is_scheduled=true

%slice (p0: f32[10,4,8], p1: s32[]) -> f32[1,4,8] {
  %p0 = f32[10,4,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %cut = f32[1,4,8]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,4,8}
}

%put (q0: f32[10,8,8], q1: f32[4,8], q2: s32[]) -> (f32[10,8,8], f32[8,8]) {
  %q0 = f32[10,8,8]{2,1,0} parameter(0)
  %q1 = f32[4,8]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %product = f32[8,8]{1,0} dot(%q1, %q1), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %row = f32[1,8,8]{2,1,0} bitcast(%product)
  %put_there = f32[10,8,8]{2,1,0} dynamic-update-slice(%q0, %row, %q2)
  ROOT %both = (f32[10,8,8]{2,1,0}, f32[8,8]{1,0}) tuple(%put_there, %product)
}

ENTRY %main (x: f32[10,4,8], y: f32[10,8,8], i: s32[]) -> (f32[10,8,8], f32[8,8]) {
  %x = f32[10,4,8]{2,1,0} parameter(0)
  %y = f32[10,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %begun = ((f32[10,4,8]{2,1,0}, s32[]), f32[1,4,8]{2,1,0}, u32[]) fusion-start(%x, %i), kind=kLoop, calls=%slice
  %one = f32[1,4,8]{2,1,0} fusion-done(%begun)
  %flat = f32[4,8]{1,0} bitcast(%one)
  %more = ((f32[10,8,8]{2,1,0}, f32[4,8]{1,0}, s32[]), (f32[10,8,8]{2,1,0}, f32[8,8]{1,0}), u32[]) \
fusion-start(%y, %flat, %i), kind=kLoop, calls=%put
  ROOT %end = (f32[10,8,8]{2,1,0}, f32[8,8]{1,0}) fusion-done(%more)
}
"""


def test_fusions_that_are_started_and_waited_for():
    work = work_of(GPU)
    assert work.products == 2 * 8 * 8 * 4
    # A slice of 128 bytes and a place of 4, read and written; then that slice and a place read, 256 written into the
    # stack and 256 beside it.
    assert work.bytes == (128 + 4 + 128) + (128 + 4 + 256 + 256)


def test_convolutions_that_stand_for_batched_products():
    """A product for each of 4 heads, as TPUs write it: padding all around one input place, and a window that meets
    it once an output."""
    lines = """HloModule m

ENTRY %main (a: bf16[2,1,512,64], b: bf16[4,64,32,1]) -> f32[2,512,4,32] {
  %a = f32[2,1,512,64]{3,2,1,0} parameter(0)
  %b = bf16[4,1,64,32]{3,2,1,0} parameter(1)
  ROOT %c = f32[2,4,512,32]{3,2,1,0} convolution(%a, %b), window={size=4x1 pad=3_3x0_0 rhs_reversal=1x0}, \
dim_labels=b01f_01io->b01f
}
"""
    assert work_of(lines).products == 2 * 2 * 4 * 512 * 32 * 64
    strided = """HloModule m

ENTRY %main (x: f32[1,4,9], k: f32[6,2,3]) -> f32[1,6,5] {
  %x = f32[1,4,9]{2,1,0} parameter(0)
  %k = f32[6,2,3]{2,1,0} parameter(1)
  ROOT %c = f32[1,6,5]{2,1,0} convolution(%x, %k), window={size=3 stride=2 pad=1_1}, \
dim_labels=bf0_oi0->bf0, feature_group_count=2
}
"""
    # Outputs at 0, 2, 4, 6, 8 under taps at -1, 0, 1: the first and the last miss one tap each.
    assert work_of(strided).products == 2 * 6 * 2 * (5 * 3 - 2)


def test_what_is_said_of_memory_and_time():
    class Memory:
        argument_size_in_bytes, temp_size_in_bytes = 4 * 2**30, 60 * 2**30
        output_size_in_bytes, alias_size_in_bytes, generated_code_size_in_bytes = 2 * 2**20, 2**20, 0

    h100, v5e = chip_of("NVIDIA H100 80GB HBM3"), chip_of("TPU v5 lite")
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in memory_line(Memory, h100)
    assert memory_line(Memory, v5e).endswith("of the 16.0 GiB of a TPU v5e: does not fit, it lacks 48.00 GiB")
    assert memory_line(Memory, None).endswith("outputs kept apart 1.0 MiB; together 64.00 GiB")
    work = Work(197e12, 819e9 / 2, 3e9, {"all-reduce": Traffic(2, 1e9, 4e9)}, 3, 1)
    lines = work_lines(work, 98.5e12)
    assert lines[0] == (
        "products: 197.000 TFLOP beside 3 calls of kernels that do not report theirs; "
        "the model's own (3 x forward) 98.500 TFLOP"
    )
    assert lines[2] == "1 loops of unknown length are counted as one turn" and " ".join(lines[4].split()) == (
        "all-reduce 2 calls 953.7 MiB, 3,814.7 MiB sent as rings"
    )
    assert time_lines(work, 98.5e12, v5e, 1000, 4) == [
        "roofline (data-sheet peaks, not measured): products 1.00 s, main memory 500.00 ms, links 20.00 ms",
        "  bound by products: 1.00 s per step, 1,000 tokens/s on 4 devices, MFU 50%",
        "the compiler's estimate: 2.00 s (3,000,000,000 cycles at 1.5 GHz; kernels and collectives are not in it)",
    ]


def test_shapes():
    assert bytes_of("(f32[2,3]{1,0}, /*index=1*/bf16[4]{0}, pred[], u32[]{:S(2)}, s4[8])") == 24 + 8 + 1 + 4
    assert bytes_of("(f32[2]{0:S(1)}, token[])", everywhere=True) == 8
    with pytest.raises(StopIteration):
        work_of("HloModule empty\n")
    assert np.isfinite(bytes_of("f8e4m3fn[16]{0}"))
