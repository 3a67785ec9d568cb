"""Mixers and the parts they are made of. A mixer imported here can be named in configs and is held to every law of the
contract suite (tests/layers/test_mixer_laws.py)."""

from recollect.layers.mixer import MixerConfig
from recollect.layers.mixers.attention import Attention
from recollect.layers.mixers.base_convolution import BaseConvolution
from recollect.layers.mixers.gated_convolution import GatedConvolution
from recollect.layers.mixers.hyena import Hyena
from recollect.layers.mixers.landmark import Landmark
from recollect.layers.mixers.linear_attention import LinearAttention
from recollect.layers.mixers.mixture_of_heads import MixtureOfHeads
from recollect.layers.mixers.sliding_window import SlidingWindow
from recollect.layers.modules.short_convolution import ShortConvolution

MIXERS = tuple(
    found
    for found in list(globals().values())
    if isinstance(found, type) and issubclass(found, MixerConfig) and found is not MixerConfig
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
