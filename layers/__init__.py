"""Mixers and the parts they are made of. A mixer imported here can be named in configs and is held to every law of the contract
suite (tests/test_mixer_laws.py)."""

from layers.attention import Attention
from layers.base_convolution import BaseConvolution
from layers.gated_convolution import GatedConvolution
from layers.hyena import Hyena
from layers.landmark import Landmark
from layers.linear_attention import LinearAttention
from layers.mixer import MixerConfig
from layers.mixture_of_heads import MixtureOfHeads
from layers.short_convolution import ShortConvolution
from layers.sliding_window import SlidingWindow

MIXERS = tuple(
    found for found in list(globals().values()) if isinstance(found, type) and issubclass(found, MixerConfig) and found is not MixerConfig
)
"""Config classes of all mixers."""

__all__ = [
    "MIXERS",
    "Attention",
    "BaseConvolution",
    "GatedConvolution",
    "Hyena",
    "Landmark",
    "LinearAttention",
    "MixerConfig",
    "MixtureOfHeads",
    "ShortConvolution",
    "SlidingWindow",
]
