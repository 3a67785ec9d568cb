"""Mixers and the parts they are made of. A mixer imported here can be named in configs and is held to every law of the contract
suite (tests/test_mixer_laws.py)."""

from layers.linear_attention import LinearAttention
from layers.landmark import Landmark
from layers.mixer import MixerConfig

MIXERS = tuple(found for found in list(globals().values()) if isinstance(found, type) and issubclass(found, MixerConfig) and found is not MixerConfig)
"""Config classes of all mixers."""
