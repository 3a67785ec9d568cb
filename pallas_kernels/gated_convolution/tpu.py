"""The short convolution for TPUs: one pass over the tokens forward, one backward, each reading and writing every array
once.

A program holds a block of tokens and channels; programs of a row run one after another. Shifts are loads at other rows
of a scratch
window, which keeps the 8 inputs before the block. Backward runs from the end: the window then keeps the 8 gradients
after the block, and inputs are gated and convolved again instead of stored.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.gated_convolution import SHORT_DIMENSIONS, short_kernels
from recollect.pallas_kernels.gated_convolution.short_kernels import (
    BIAS_ROW,
    EDGE,
    WEIGHT_ROWS,
    Gradients,
    Operands,
    ShortKernel,
)
from recollect.pallas_kernels.sharding import over_mesh

TOKENS = 256
CHANNELS = 256
HALO = 16  # rows of the block before that backward reads: a tile of bf16


def refuses(x, taps, bias=None, **settings: Any) -> dispatch.Refusal:
    """Why these kernels cannot serve a call; None if they can."""
    if taps.shape[0] > short_kernels.MAXIMUM_TAPS:
        return f"it has up to {short_kernels.MAXIMUM_TAPS} taps; this call {taps.shape[0]}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32; this is {x.dtype}"
    return None


def _forward(operands: Operands, taps: int, activation: str) -> jax.Array:
    b, t, d = operands.x.shape
    grid, rows, channels = _grid(b, t, d)
    tokens = _token_spec(rows, channels, lambda i: i)
    arrays, specs = _inputs(operands, tokens, rows, channels, lambda i: i)
    names = list(arrays)

    def kernel(*refs):
        y_ref, window = refs[-2:]
        ref = dict(zip(names, refs, strict=False))

        @pl.when(pl.program_id(2) == 0)
        def _():
            window[:EDGE] = ref["state"][0]

        reach, valid = _masks(ref, rows)
        window[EDGE:] = _gated(ref["x"], ref.get("in_gate"), valid)
        y = _before_activation(window, ref["weights"], reach, taps, rows)[0]
        y = jax.nn.silu(y) if activation == "silu" else y
        if "out_gate" in ref:
            y = y * ref["out_gate"][0].astype(jnp.float32)
        y_ref[0] = (y if valid is None else jnp.where(valid, y, 0)).astype(y_ref.dtype)
        if grid[2] > 1:
            window[:EDGE] = window[rows : rows + EDGE]

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs,
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct((b, t, d), operands.x.dtype),
        scratch_shapes=[pltpu.VMEM((EDGE + rows, channels), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(operands, 1, 2 * taps),
        interpret=_interpret(),
        name="short_convolution_forward",
    )(*arrays.values())


def _backward(operands: Operands, dy: jax.Array, taps: int, activation: str) -> Gradients:
    b, t, d = operands.x.shape
    grid, rows, channels = _grid(b, t, d)
    last = grid[2] - 1
    tokens = _token_spec(rows, channels, lambda i: last - i)
    arrays, specs = _inputs(operands, tokens, rows, channels, lambda i: last - i)
    arrays["dy"] = dy
    specs.append(tokens)
    if last:
        step = rows // HALO
        before = pl.BlockSpec((1, HALO, channels), lambda b, c, i: (b, jnp.maximum((last - i) * step - 1, 0), c))
        for name in ("x", "in_gate"):
            if name in arrays:
                arrays[name + "_before"] = arrays[name]
                specs.append(before)
    names = list(arrays)
    gated = [name for name in ("x", "in_gate", "out_gate") if name in arrays]
    outputs = [jax.ShapeDtypeStruct((b, t, d), arrays[name].dtype) for name in gated]
    outputs += [jax.ShapeDtypeStruct((b, WEIGHT_ROWS, d), jnp.float32), jax.ShapeDtypeStruct((b, EDGE, d), jnp.float32)]
    output_specs = [tokens] * len(gated)
    output_specs += [pl.BlockSpec((1, n, channels), lambda b, c, i: (b, 0, c)) for n in (WEIGHT_ROWS, EDGE)]

    def kernel(*refs):
        window, ahead = refs[-2:]
        ref = dict(zip(names, refs, strict=False))
        out = dict(zip([*gated, "weights", "first"], refs[len(names) :], strict=False))
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            ahead[rows:] = jnp.zeros((EDGE, channels), jnp.float32)
            out["weights"][0] = jnp.zeros((WEIGHT_ROWS, channels), jnp.float32)

        @pl.when(step == last)
        def _():
            window[:EDGE] = ref["state"][0]

        if last:

            @pl.when(step != 0)
            def _():
                ahead[rows:] = ahead[:EDGE]

            @pl.when(step != last)
            def _():
                window[:EDGE] = _gated(ref["x_before"], ref.get("in_gate_before"), None)[HALO - EDGE :]

        reach, valid = _masks(ref, rows)
        follow = None if reach is None else jax.lax.shift_right_arithmetic(ref["links"][0, 0].reshape(rows, 1), 4)
        if t % rows:  # what lies past the end is anything
            inside = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < t - (last - step) * rows
            valid = inside if valid is None else valid & inside
        window[EDGE:] = _gated(ref["x"], ref.get("in_gate"), valid)
        before, shifted = _before_activation(window, ref["weights"], reach, taps, rows)
        gradient = ref["dy"][0].astype(jnp.float32)
        if "out_gate" in ref:
            y = jax.nn.silu(before) if activation == "silu" else before
            out["out_gate"][0] = _masked(gradient * y, valid).astype(out["out_gate"].dtype)
            gradient = gradient * ref["out_gate"][0].astype(jnp.float32)
        if activation == "silu":
            gate = jax.nn.sigmoid(before)
            gradient = gradient * gate * (1 + before * (1 - gate))
        gradient = _masked(gradient, valid)
        ahead[:rows] = gradient
        for lag in range(taps):
            out["weights"][0, lag : lag + 1] += jnp.sum(gradient * shifted(lag), axis=0, keepdims=True)
        out["weights"][0, BIAS_ROW : BIAS_ROW + 1] += jnp.sum(gradient, axis=0, keepdims=True)

        inputs = ref["weights"][0:1] * gradient
        for lag in range(1, taps):
            part = ahead[lag : lag + rows]
            inputs += ref["weights"][lag : lag + 1] * (part if follow is None else jnp.where(follow >= lag, part, 0))
        if "in_gate" in ref:
            out["in_gate"][0] = _masked(inputs * ref["x"][0].astype(jnp.float32), valid).astype(out["in_gate"].dtype)
            inputs = inputs * ref["in_gate"][0].astype(jnp.float32)
        out["x"][0] = _masked(inputs, valid).astype(out["x"].dtype)

        @pl.when(step == last)
        def _():
            out["first"][0] = ahead[:EDGE]

    results = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs,
        out_specs=output_specs,
        out_shape=outputs,
        scratch_shapes=[
            pltpu.VMEM((EDGE + rows, channels), jnp.float32),
            pltpu.VMEM((rows + EDGE, channels), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(operands, 2 + len(gated), 6 * taps),
        interpret=_interpret(),
        name="short_convolution_backward",
    )(*arrays.values())
    found = dict(zip([*gated, "weights", "first"], results, strict=True))
    return Gradients(found["x"], found.get("in_gate"), found.get("out_gate"), found["weights"], found["first"])


def _masks(ref, rows: int):
    """How far back taps reach and what is valid, (rows, 1) each; None without segments."""
    if "links" not in ref:
        return None, None
    links = ref["links"][0, 0].reshape(rows, 1)
    return jnp.where(links < 0, -1, links & 15), links >= 0


def _masked(values, valid):
    return values if valid is None else jnp.where(valid, values, 0)


def _gated(x_ref, gate_ref, valid):
    inputs = x_ref[0].astype(jnp.float32)
    if gate_ref is not None:
        inputs = inputs * gate_ref[0].astype(jnp.float32)
    return _masked(inputs, valid)


def _before_activation(window, weights, reach, taps: int, rows: int):
    """The convolution with its bias, and the function lag -> inputs that many tokens back."""

    def shifted(lag: int):
        inputs = window[EDGE - lag : EDGE - lag + rows]
        return inputs if reach is None or lag == 0 else jnp.where(reach >= lag, inputs, 0)

    total = weights[BIAS_ROW : BIAS_ROW + 1] + weights[0:1] * shifted(0)
    for lag in range(1, taps):
        total += weights[lag : lag + 1] * shifted(lag)
    return total, shifted


def _grid(b: int, t: int, d: int) -> tuple[tuple[int, int, int], int, int]:
    """The grid (rows, channel blocks, token blocks) and a block's tokens and channels."""
    rows = min(TOKENS, -(-t // 128) * 128)
    channels = min(CHANNELS, -(-d // 128) * 128)
    return (b, pl.cdiv(d, channels), pl.cdiv(t, rows)), rows, channels


def _token_spec(rows: int, channels: int, place) -> pl.BlockSpec:
    return pl.BlockSpec((1, rows, channels), lambda b, c, i: (b, place(i), c))


def _inputs(
    operands: Operands, tokens, rows: int, channels: int, place
) -> tuple[dict[str, jax.Array], list[pl.BlockSpec]]:
    t = operands.x.shape[1]
    gated = {"x": operands.x, "in_gate": operands.in_gate, "out_gate": operands.out_gate}
    arrays = {name: array for name, array in gated.items() if array is not None}
    specs = [tokens] * len(arrays)
    arrays["weights"] = operands.weights
    specs.append(pl.BlockSpec((WEIGHT_ROWS, channels), lambda b, c, i: (0, c)))
    arrays["state"] = operands.state
    specs.append(pl.BlockSpec((1, EDGE, channels), lambda b, c, i: (b, 0, c)))
    if operands.links is not None:
        links = jnp.pad(operands.links, ((0, 0), (0, -t % rows)), constant_values=-1)
        arrays["links"] = links.reshape(
            links.shape[0], -1, 1, rows
        )  # tokens along lanes: a column would be padded to 128
        specs.append(pl.BlockSpec((1, 1, 1, rows), lambda b, c, i: (b, place(i), 0, 0)))
    return arrays, specs


def _cost(operands: Operands, passes: int, flops: int) -> pl.CostEstimate:
    x = operands.x
    read = sum(array is not None for array in (operands.x, operands.in_gate, operands.out_gate))
    return pl.CostEstimate(
        flops=flops * x.size, transcendentals=x.size, bytes_accessed=(read + passes) * x.size * x.dtype.itemsize
    )


def _interpret() -> Any:
    how = dispatch.interpretation()
    return pltpu.InterpretParams(detect_races=True) if how == "races" else how == "values"


short_convolution = over_mesh(
    functools.partial(short_kernels.short_convolution, ShortKernel(_forward, _backward)),
    SHORT_DIMENSIONS,
    ("b t h", "b s h"),
)
