"""First values of recurrent mixers' parameters beside the published ones: bounds, mean and spread over many draws; and
settings that cannot be."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.configuration import UserError
from recollect.layers.mixer import Place
from recollect.layers.recurrent import StreamMixer
from recollect.models import flatten
from tests.layers.mixers.state_space_initial_values import (
    STATE_SPACE_VALUES,
    D,
    constant,
    mamba_steps,
    normal,
    uniform,
)

DRAWS = 24


def draws(config, place=Place(1, 4)):
    """Path -> values of all draws, float64."""
    each = []
    for seed in range(DRAWS):
        module = config.build(D, place, nnx.Rngs(params=jax.random.key(seed)))
        each.append(flatten(nnx.to_pure_dict(nnx.state(module))))
    return {path: np.stack([np.asarray(one[path], np.float64) for one in each]) for path in each[0]}


def orthogonal(values, gain):
    for matrix in values:
        rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        np.testing.assert_allclose(rows @ rows.T, gain**2 * np.eye(len(rows)), atol=1e-5)


def mamba_rates(low):
    return lambda values: uniform(np.exp(values), low, 16)


def linear(values):
    normal(values, 0.02)


def output(values):
    normal(values, 0.02 / 8**0.5)  # 0.02 / sqrt(2 layers)


def taps(values):
    uniform(values, -0.5, 0.5)  # torch's Conv1d with 4 taps


def torch_linear(values):
    uniform(values, -(D**-0.5), D**-0.5)


PROJECTIONS = {f"{name}.kernel": linear for name in ("query", "key", "value")} | {"output.kernel": output}
CONVOLUTIONS = {f"convolutions.{name}.taps": taps for name in ("query", "key", "value")}
ONES = {"gate.norm.gain": lambda values: constant(values, 1)}
DELTA = PROJECTIONS | CONVOLUTIONS | ONES | {"strength.projection.kernel": linear}
GATE = {"gate.projection.kernel": linear}
LOW_RANK_DECAY = {f"decay.projection.{part}.kernel": linear for part in ("down", "up")}
LOW_RANK_GATE = {f"gate.projection.{part}.kernel": linear for part in ("down", "up")} | {
    "gate.projection.up.bias": lambda values: constant(values, 0)
}
KIMI = LOW_RANK_DECAY | LOW_RANK_GATE | {"decay.step_bias": mamba_steps, "decay.log_rate": mamba_rates(1)}
GATED = (
    DELTA
    | GATE
    | {
        "decay.projection.kernel": linear,
        "decay.step_bias": mamba_steps,
        "decay.log_rate": mamba_rates(0),
    }
)

MAMBA2 = (
    dict.fromkeys(PROJECTIONS, torch_linear)
    | CONVOLUTIONS
    | {f"convolutions.{name}.bias": taps for name in ("query", "key", "value")}
    | {"output.kernel": lambda values: uniform(values, -0.5 * (2 * D) ** -0.5, 0.5 * (2 * D) ** -0.5)}
    | dict.fromkeys(["gate.projection.kernel", "decay.projection.kernel"], torch_linear)
    | ONES
    | {
        "skip.weight": lambda values: constant(values, 1),
        "decay.step_bias": mamba_steps,
        "decay.log_rate": mamba_rates(1),
    }
)


def rwkv7():
    """Of layer 1 of 4, width 48, heads of 24 (RWKV-LM's and flash-linear-attention's tables)."""
    n = np.arange(D)
    line, zigzag = n / (D - 1), ((n % 24) - 11.5) / 11.5
    zigzag = zigzag * np.abs(zigzag)
    exponents = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    mixes = {
        f"mixes.{name}.mix": lambda values, power=power: constant(values, 1 - (n / D) ** (power * 0.75))
        for name, power in exponents.items()
    }
    maps = {f"{name}.down.kernel": lambda values: constant(values, 0) for name in ("decay", "strength", "gate")}
    maps |= {f"{name}.up.kernel": lambda values: orthogonal(values, 0.1) for name in ("decay", "strength", "gate")}
    return (
        mixes
        | maps
        | {
            "decay.up.bias": lambda values: constant(
                values, -6 + 6 * line ** (1 + (1 / 3) ** 0.3) + 0.5 + 2.5 * zigzag
            ),
            "strength.up.bias": lambda values: constant(values, -0.19 + 0.3 * zigzag + 0.4 * (line - 0.5)),
            "erase_scale": lambda values: constant(values, (0.71 - 0.1 * (line - 0.5)).reshape(2, 24)),
            "key_scale": lambda values: constant(values, 1.02),
            "bonus": lambda values: constant(values, -0.04),
            "norm.gain": lambda values: constant(values, 0.5**0.7),
            "norm.bias": lambda values: constant(values, 0),
            "query.kernel": lambda values: orthogonal(values, 1),
            "key.kernel": lambda values: orthogonal(values, 0.1),
            "value.kernel": lambda values: orthogonal(values, 1),
            "output.kernel": lambda values: constant(values, 0),
        }
    )


def rwkv6():
    """Of layer 1 of 4, width 48 (RWKV-LM's tables)."""
    n = np.arange(D)
    line, exponents = n / (D - 1), {"r": 0.5, "w": 1.0, "k": 1.0, "v": 1.0, "g": 0.5}
    first = {
        f"mixes.{name}.up.bias": lambda values, power=power, less=0.1 * (name == "v"): constant(
            values, 1 - (n / D) ** (power * 0.75) - less
        )
        for name, power in exponents.items()
    }
    maps = ("decay", *(f"mixes.{name}" for name in exponents))
    return (
        first
        | {f"{name}.down.kernel": lambda values: constant(values, 0) for name in maps}
        | {f"{name}.up.kernel": lambda values: uniform(values, -0.01, 0.01) for name in maps}
        | {
            "mix_all.mix": lambda values: constant(values, 1 - (n / D) ** 0.75),
            "decay.up.bias": lambda values: constant(values, -6 + 5 * line ** (0.7 + 1.3 / 3)),
            "bonus": lambda values: constant(values, ((1 - line) / 3 + 0.1 * ((n + 1) % 3 - 1)).reshape(2, 24)),
            "gate.norm.bias": lambda values: constant(values, 0),
        }
    )


PUBLISHED = {
    layers.RWKV6(): PROJECTIONS | GATE | ONES | rwkv6(),
    layers.GatedSlotAttention(): PROJECTIONS
    | {"decay.projection.kernel": linear, "norm.gain": lambda values: constant(values, 1)},
    layers.DeltaNet(): DELTA,
    layers.GatedDeltaNet(heads=4): GATED,
    layers.KimiDeltaAttention(heads=4): DELTA | KIMI,
    layers.KimiDeltaAttention(heads=4, bound=5.0): DELTA
    | KIMI
    | {"decay.log_rate": lambda values: constant(values, 0)},
    layers.GatedDeltaNet2(heads=4): PROJECTIONS
    | CONVOLUTIONS
    | ONES
    | KIMI
    | {"erase.kernel": linear, "write.kernel": linear},
    layers.DeltaProduct(heads=4): GATED,
    layers.Comba(heads=4): GATED
    | {"inner_decay": lambda values: constant(values, 1), "correction": lambda values: constant(values, 0.02)},
    layers.Retention(): PROJECTIONS | GATE | ONES,
    layers.Lightning(): PROJECTIONS | GATE | ONES | {"depth_share": lambda values: constant(values, 1 / 3)},
    layers.GatedLinearAttention(): PROJECTIONS
    | GATE
    | ONES
    | LOW_RANK_DECAY
    | {"decay.projection.up.bias": lambda values: constant(values, 0)},
    layers.HGRN2(): PROJECTIONS
    | {
        "norm.gain": lambda values: constant(values, 1),
        "lower.logit": lambda values: constant(values, math.log(1 / 3)),
    },
    layers.HGRN(): ONES
    | {f"{name}.kernel": linear for name in ("input", "forget", "gate.projection")}
    | {"output.kernel": output, "lower.logit": lambda values: constant(values, math.log(1 / 3))},
    layers.MinGRU(): {
        "update.kernel": linear,
        "candidate.kernel": linear,
        "output.kernel": output,
        "update.bias": lambda values: constant(values, 0),
    },
    layers.RGLRU(): {
        "input.kernel": linear,
        "gate.kernel": linear,
        "output.kernel": output,
        "convolution.taps": taps,
        "convolution.bias": taps,
        "rate": lambda values: uniform(np.exp(-2 * np.log1p(np.exp(values))), 0.9**2, 0.999**2),
    }
    | {f"{name}.bias": lambda values: constant(values, 0) for name in ("input", "gate", "output")}
    | {f"gates.{name}.kernel": lambda values: normal(values, 12**-0.5) for name in ("input", "recurrence")}
    | {f"gates.{name}.bias": lambda values: constant(values, 0) for name in ("input", "recurrence")},
    layers.MLSTM(): PROJECTIONS
    | GATE
    | ONES
    | {
        "input_gate.kernel": lambda values: constant(values, 0),
        "forget_gate.kernel": lambda values: constant(values, 0),
        "input_gate.bias": lambda values: normal(values, 0.1),
        "forget_gate.bias": lambda values: constant(values, [3, 4, 5, 6]),
    },
    layers.Mamba2(): MAMBA2,
    layers.RWKV7(): rwkv7(),
    layers.RWKV7(value_residual=True): rwkv7()
    | {
        "value_share.down.kernel": lambda values: constant(values, 0),
        "value_share.up.kernel": lambda values: orthogonal(values, 0.1),
        "value_share.up.bias": lambda values: constant(values, 0.73 - 0.4 * (np.arange(D) / (D - 1) - 0.5)),
    },
    layers.LinearAttention(): PROJECTIONS,
    **STATE_SPACE_VALUES,
    layers.LogLinearMamba2(): MAMBA2
    | {"levels.projection.kernel": torch_linear, "levels.scale": lambda values: constant(values, 1)},
    layers.LogLinearGatedDeltaNet(heads=4): GATED
    | {"levels.projection.kernel": linear, "levels.scale": lambda values: constant(values, 1)},
    layers.MesaNet(): PROJECTIONS
    | {f"convolutions.{name}.taps": taps for name in ("query", "key")}
    | {f"{name}.kernel": linear for name in ("decay.projection", "strength")}
    | {f"{name}.bias": lambda values: constant(values, 0) for name in ("decay.projection", "strength")}
    | {
        "ridge": lambda values: constant(np.log1p(np.exp(values)) + 0.25, 1),
        "norm.gain": lambda values: constant(values, 1),
    },
    layers.TTTLinear(): PROJECTIONS
    | {"weights": linear, "rate.kernel": linear}
    | {f"{name}": lambda values: constant(values, 1) for name in ("gain", "norm.gain")}
    | {name: lambda values: constant(values, 0) for name in ("bias", "shift", "share", "rate.bias", "norm.bias")},
    layers.Titans(): PROJECTIONS
    | CONVOLUTIONS
    | GATE
    | ONES
    | {f"{name}.kernel": linear for name in ("keep", "momentum", "rate")}
    | {f"{name}.bias": lambda values: constant(values, 0) for name in ("momentum", "rate")}
    | {"keep.bias": lambda values: constant(values, 4)},
}


def check_first_values(config, published):
    values = draws(config)
    assert values.keys() == published.keys()
    for path, check in published.items():
        try:
            check(values[path])
        except AssertionError as error:
            raise AssertionError(f"{path}: {error}") from error


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: type(config).__name__)
def test_first_values_are_the_published_ones(config):
    check_first_values(config, PUBLISHED[config])


def test_every_recurrent_mixer_is_here():
    modules = {cls: cls().build(D, Place(0, 2), nnx.Rngs(params=jax.random.key(0))) for cls in layers.MIXERS}
    recurrent = {cls for cls, module in modules.items() if isinstance(module, StreamMixer)}
    assert {type(config) for config in PUBLISHED} == recurrent


def test_first_layers_forget_without_bounds_and_last_layers_almost_never():
    first, last = (draws(layers.HGRN2(), Place(index, 4))["lower.logit"] for index in (0, 3))
    assert (1 / (1 + np.exp(-first)) < 2e-6).all() and np.allclose(1 / (1 + np.exp(-last)), 0.75)
    shares = [draws(layers.Lightning(), Place(index, 4))["depth_share"][0] for index in (0, 3)]
    assert shares == [0, 1]
    paper = layers.Lightning(decay="paper")
    assert [draws(paper, Place(index, 4))["depth_share"][0] for index in (0, 3)] == [0, 0.75]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.GatedDeltaNet(heads=5), "heads=5 does not divide the model width 48"),
        (lambda: layers.GatedDeltaNet(heads=4, key_heads=3), "key_heads=3: must divide heads=4"),
        (lambda: layers.DeltaNet(kernel=0), "kernel=0: a convolution needs at least 1 tap"),
        (lambda: layers.DeltaNet(key_heads=0), "key_heads=0: must be at least 1"),
        (lambda: layers.DeltaProduct(steps=0), "steps=0: must be at least 1"),
        (lambda: layers.KimiDeltaAttention(value_dim=-1), "value_dim=-1: must be at least 1"),
        (lambda: layers.KimiDeltaAttention(bound=0.0), r"bound=0\.0: must be positive"),
        (lambda: layers.Mamba2(key_heads=3), "key_heads=3: must divide heads=4"),
        (lambda: layers.Mamba2(key_dim=0), "key_dim=0: must be at least 1"),
        (lambda: layers.GatedLinearAttention(rank=0), "rank=0: must be at least 1"),
        (lambda: layers.GatedLinearAttention(temperature=0.0), r"temperature=0\.0: must be positive"),
        (lambda: layers.MLSTM(cap=-1.0), r"cap=-1\.0: must be positive"),
        (lambda: layers.RWKV7(heads=48), "heads=48: RWKV7 needs at least 2 key dimensions per head; got 1"),
        (lambda: layers.RWKV7(value_residual=True, causal=False), "value_residual=True beside causal=False"),
        (lambda: layers.Retention(heads=48), "Rotary.* too few of a head's 1"),
        (lambda: layers.Lightning(heads=0), "heads=0: must be at least 1"),
        (lambda: layers.GatedSlotAttention(slots=0), "slots=0: must be at least 1"),
        (lambda: layers.RWKV6(mix_rank=0), "mix_rank=0: must be at least 1"),
        (lambda: layers.RGLRU(heads=5), "heads=5 does not divide the 48 channels"),
        (lambda: layers.RGLRU(channels=0), "channels=0: must be at least 1"),
        (lambda: layers.LogLinearMamba2(levels=1), "levels=1: must be at least 2"),
        (lambda: layers.MesaNet(steps=0), "steps=0: must be at least 1"),
        (lambda: layers.TTTLinear(batch=0), "batch=0: must be at least 1"),
        (lambda: layers.TTTLinear(key_dim=5), "key_dim=5: TTTLinear needs as many as value_dim=24"),
        (lambda: layers.Titans(rate=0.0), r"rate=0\.0: must be positive"),
        (lambda: layers.MinGRU(expansion=0.0), r"expansion=0\.0: must be positive"),
        (lambda: layers.Mamba(state=0), "state=0: must be at least 1"),
        (lambda: layers.S4D(state=5), "state=5: must be even and at least 2"),
        (lambda: layers.H3(head_dim=5), "head_dim=5 does not divide the model width 48"),
        (lambda: layers.Hyena2(groups=5), "groups=5 does not divide the model width 48"),
        (lambda: layers.Hyena2(taps=9), 'taps=9: filter="LI" is infinitely long'),
        (lambda: layers.Mamba3(turning=0.0), r"turning=0\.0: must be in \(0, 1\]"),
        (lambda: layers.Mamba3(key_dim=2), r"turning=0\.5: no pair of the key_dim=2 state dimensions turns"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(UserError, match=message):
        make().build(D, Place(0, 2), nnx.Rngs(params=jax.random.key(0)))
