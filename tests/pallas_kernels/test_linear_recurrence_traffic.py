"""What the delta rule moves through an H100's memory at b4 t4096 h64 d128 in bf16, read from compiled programs.

The arrays that any kernel of it must move, q, k, v and o, are 1.07 GB in the forward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from recollect.pallas_kernels import compile_ahead
from recollect.pallas_kernels.linear_recurrence import linear_recurrence
from tests.pallas_kernels import traffic
from tests.pallas_kernels.test_compile_ahead import needs_cuda

B, T, HEADS, SIZE = 4, 4096, 64, 128


def test_bytes_and_launches_of_a_text():
    text = """
%inner (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %b = f32[8,4]{1,0} add(%a, %a)
}

ENTRY %main (x: f32[8,4]) -> bf16[8] {
  %x = f32[8,4]{1,0} parameter(0)
  %flat = f32[32]{0} bitcast(%x)
  %first = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%inner
  %both = (f32[4]{0}, bf16[8]{0}) custom-call(%x, %flat, %first), custom_call_target="mosaic_gpu_v2"
  ROOT %out = bf16[8]{0} get-tuple-element(%both), index=1
}
"""
    assert traffic.of(text) == (2, 2 * 128 + 2 * 128 + 16 + 16)


def _array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _given(decay: str) -> dict[str, jax.ShapeDtypeStruct]:
    given = dict.fromkeys(("q", "k", "v", "erase_read"), _array(B, T, HEADS, SIZE))
    given["write_strength"] = _array(B, T, HEADS, dtype=jnp.float32)
    shapes = {"head": (B, T, HEADS), "key": (B, T, HEADS, SIZE)}
    return given | ({"log_decay": _array(*shapes[decay], dtype=jnp.float32)} if decay in shapes else {})


def _forward(given):
    return linear_recurrence(**given, scale=SIZE**-0.5, backend="pallas_gpu")[0]


def _both(given, do):
    o, pull = jax.vjp(_forward, given)
    return o, pull(do)


@needs_cuda
@pytest.mark.wide
@pytest.mark.parametrize(
    ("decay", "function", "most_launches", "most_gigabytes"),
    [
        ("none", _forward, 6, 3.0),
        ("none", _both, None, 12.0),
        ("head", _forward, 6, 3.0),
        ("head", _both, None, 12.0),
        ("key", _forward, 6, 4.5),
    ],
)
def test_the_delta_rule_moves_little(decay, function, most_launches, most_gigabytes):
    arguments = (_given(decay),) if function is _forward else (_given(decay), _array(B, T, HEADS, SIZE))
    report = compile_ahead.report("h100", function, *arguments, limit=300)
    assert report.complaints() == []
    launches, moved = traffic.of(report.compiled.as_text())
    assert moved <= most_gigabytes * 1e9
    assert most_launches is None or launches <= most_launches
