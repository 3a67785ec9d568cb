"""The config of Canon layers; recollect/models/canon_block.py makes them."""

from __future__ import annotations

import chz

from recollect.configuration import Config, requires
from recollect.layers.modules.short_convolution import has_taps

_some = requires(lambda places: bool(places) and not set(places) - set("abcd"), 'must be some of "a", "b", "c" and "d"')


@chz.chz(typecheck=True)
class Canon(Config):
    """Canon layers (Allen-Zhu 2025, Physics of Language Models 4.1): x + conv(x), conv causal and depthwise over
    `kernel` tokens of a document, without bias or activation, at some places of every block.

    Attributes:
      places: "a" before the mixer, after its norm; "b" on queries, keys and values, of mixers that have them; "c"
        before the MLP, after its norm; "d" inside the MLP, on what its activation takes.
      kernel: taps, the current token's included.
    """

    places: str = chz.field(default="abcd", validator=_some)
    kernel: int = chz.field(default=4, validator=has_taps)
