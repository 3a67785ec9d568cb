"""Published first values of state space models and Hyena-2, for test_recurrent_initial_values.py."""

from __future__ import annotations

import math

import numpy as np

from recollect import layers

D = 48


def uniform(values, low, high):
    assert low - 1e-5 <= values.min() and values.max() <= high + 1e-5
    tolerance = 0.1 * (high - low)
    assert abs(values.mean() - (low + high) / 2) < tolerance
    assert abs(values.std() - (high - low) / 12**0.5) < tolerance


def normal(values, deviation):
    error = deviation / values.size**0.5
    assert abs(values.mean()) < 4 * error and abs(values.std() - deviation) < 3 * error


def constant(values, expected):
    np.testing.assert_allclose(values, np.broadcast_to(expected, values.shape), rtol=1e-4, atol=1e-6)


def between(bound):
    return lambda values: uniform(values, -bound, bound)


def mamba_steps(values):
    uniform(np.log(np.log1p(np.exp(values))), math.log(1e-3), math.log(0.1))


def of_deviation(deviation):
    return lambda values: normal(values, deviation)


def equal_to(expected):
    return lambda values: constant(values, expected)


TORCH = between(D**-0.5)
WIDE = between((2 * D) ** -0.5)
RESIDUAL = between(0.5 * (2 * D) ** -0.5)  # torch's, divided by the root of 4 layers
OURS, OUTPUT = of_deviation(0.02), of_deviation(0.02 / 8**0.5)
ZERO, ONE = equal_to(0), equal_to(1)

SPACE = {
    "space.log_step": lambda values: uniform(values, math.log(1e-3), math.log(0.1)),
    "space.log_rate": equal_to(math.log(0.5)),
    "space.frequency": equal_to(math.pi * np.arange(32)),
    "space.output_real": of_deviation(0.5**0.5),
    "space.output_imag": of_deviation(0.5**0.5),
    "skip": of_deviation(1),
}

PROJECTIONS = dict.fromkeys([f"{name}.{part}" for name in ("output", "gate") for part in ("kernel", "bias")], TORCH)

HYENA = {
    "input.kernel": OURS,
    "convolution.taps": between(3**-0.5),
    "output.kernel": OUTPUT,
    "output.bias": ZERO,
}

STATE_SPACE_VALUES = {
    layers.Mamba(): {
        **dict.fromkeys(("input.kernel", "gate.kernel"), TORCH),
        **dict.fromkeys(("convolution.taps", "convolution.bias"), between(0.5)),
        **dict.fromkeys(("step_down.kernel", "write.kernel", "read.kernel"), WIDE),
        "step_up.kernel": between(3**-0.5),
        "step_bias": mamba_steps,
        "log_rate": equal_to(np.log(np.arange(1, 17))),
        "skip": ONE,
        "output.kernel": RESIDUAL,
    },
    layers.S4D(): SPACE | PROJECTIONS,
    layers.S4D(state=6, frequencies="inverse"): SPACE
    | PROJECTIONS
    | {"space.frequency": equal_to([30 / math.pi, 6 / math.pi, 1.2 / math.pi])},
    layers.H3(): {
        **SPACE,
        **dict.fromkeys([f"{name}.kernel" for name in ("query", "key", "value", "output")], OURS),
        **dict.fromkeys([f"{name}.bias" for name in ("query", "key", "value", "output")], ZERO),
        "shift.taps": between(1 / 8),
        "shift_skip": of_deviation(1),
    },
    layers.Hyena2(filter="SE"): HYENA | {"filter.taps": between(7**-0.5)},
    layers.Hyena2(filter="MR"): HYENA | {"filter.taps": of_deviation(1e-5 * 128**-0.5), "skip": between(128**-0.5)},
    layers.Hyena2(): HYENA
    | {
        "filter.log_rate": lambda values: uniform(np.exp(values), 0.01, 0.1),
        "filter.log_scale": equal_to(-1),
        "filter.residue": of_deviation(0.1 / 4),
        "skip": between(8192**-0.5),
    },
    layers.Mamba3(): {
        **dict.fromkeys(
            [f"{name}.kernel" for name in ("query", "key", "value", "rate", "step", "share", "angle")], TORCH
        ),
        "gate.projection.kernel": TORCH,
        "output.kernel": RESIDUAL,
        "step_bias": mamba_steps,
        **dict.fromkeys(("query_norm.gain", "key_norm.gain", "query_bias", "key_bias", "skip.weight"), ONE),
    },
}
"""Config -> path -> check of its values in all draws."""
