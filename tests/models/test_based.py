"""Based's published models (Arora et al. 2024, reference configurations): layer maps, and parameters counted by
arithmetic."""

import pytest

from recollect.layers import GatedConvolution, LinearAttention, SlidingWindow
from recollect.layers.mixer import MixerConfig
from recollect.layers.modules.mlp import SwiGLU
from recollect.layers.modules.positions import Rotary
from recollect.models import FunctionalModel, LanguageModel, Stage
from recollect.models.accounting import parameters_by_part

VOCABULARY = 50_264  # GPT-2's 50,257, padded to a multiple of 8

CONVOLUTION = GatedConvolution(kernel=3, expansion=4)
TAYLOR = LinearAttention(heads=16, feature_dim=16)
WINDOW = SlidingWindow(window=64, heads=16, positions=Rotary())


def layer_map(depth: int, taylor: tuple[int, ...], windows: tuple[int, ...]) -> list[MixerConfig]:
    return [TAYLOR if index in taylor else WINDOW if index in windows else CONVOLUTION for index in range(depth)]


def stages(layers: list[MixerConfig]) -> tuple[Stage, ...]:
    """The layers as stages, each time the repeated pattern that covers most of what is left."""
    found = []
    while layers:
        best = (1, 1)
        for size in range(1, 7):
            repeats = 1
            while layers[repeats * size : (repeats + 1) * size] == layers[:size]:
                repeats += 1
            if repeats > 1 and size * repeats > best[0] * best[1]:
                best = (size, repeats)
        size, repeats = best
        found.append(Stage(pattern=tuple(layers[:size]), repeats=repeats))
        layers = layers[size * repeats :]
    return tuple(found)


def by_arithmetic(width: int, convolutions: int, taylors: int, windows: int) -> dict[str, int]:
    d = width
    convolution = d * 4 * d + 4 * d + 3 * 2 * d + 2 * d * d + d  # in and its bias, taps, out and its bias
    taylor = 2 * d * 16 * 16 + d * d + d * d  # q and k, v, out
    layers = convolutions + taylors + windows
    return {
        "embedding": VOCABULARY * d,
        "mixers: GatedConvolution": convolutions * convolution,
        "mixers: LinearAttention": taylors * taylor,
        "mixers: SlidingWindow": windows * 4 * d * d,
        "mlp": layers * 3 * d * 2 * d,
        "norms": (2 * layers + 1) * d,
    }


BASED = {
    "360M": (1024, 27, (1, 6, 11, 16, 21), (2, 7, 12, 17, 22), 363e6),
    "1.3B": (1792, 36, (1, 6, 11, 16, 21, 27, 33), (2, 7, 12, 17, 22, 28, 34), 1.35e9),
}


@pytest.mark.parametrize("name", BASED)
def test_published_layer_maps_build(name):
    width, depth, taylor, windows, size = BASED[name]
    config = LanguageModel(width=width, stages=stages(layer_map(depth, taylor, windows)), mlp=SwiGLU(hidden=2 * width))
    assert list(config.mixers) == layer_map(depth, taylor, windows)
    assert config.stages[0] == Stage(pattern=(CONVOLUTION, TAYLOR, WINDOW, CONVOLUTION, CONVOLUTION), repeats=5)
    parts = parameters_by_part(FunctionalModel(config, VOCABULARY))
    expected = by_arithmetic(width, depth - len(taylor) - len(windows), len(taylor), len(windows))
    assert {part: count for part, count in parts.items() if part != "total"} == expected
    assert parts["total"] == sum(expected.values()) == pytest.approx(size, rel=0.03)
