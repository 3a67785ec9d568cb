"""How a mixer looks in every figure and page: one colour per class of mixer, whatever else is shown.

Colours: those of Okabe and Ito (2008, "Color Universal Design"), which stay apart for colour-blind readers, then
Paul Tol's muted ones (SRON technical note EPS/TN/09-002).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (
    *(BLUE, ORANGE, GREEN, PINK, YELLOW, SKY),
    *("#332288", "#882255", "#999933", "#117733", "#AA4499", "#44AA99", "#6E4B1E", "#777777"),
)
MIXERS = {
    "Attention": BLUE,
    "LinearAttention": ORANGE,
    "SlidingWindow": GREEN,
    "BaseConvolution": PINK,
    "Hyena": YELLOW,
    "Landmark": SKY,
    "MixtureOfHeads": "#332288",
}
"""Colours of the mixers of published comparisons; another class has the one that its name's checksum picks."""


def mixer_of(config: dict[str, Any]) -> str:
    """Returns what mixes tokens in a run's config.json: class names of its mixers, "A + B" for several; short
    convolutions, which prepare the input of another mixer, are named only where they are alone; "" where none is."""
    stages = config.get("model", {}).get("stages") or []
    mixers = [mixer for stage in stages for mixer in stage.get("pattern") or []]
    long = [mixer["class"] for mixer in mixers if not mixer.get("kernel")]
    return " + ".join(dict.fromkeys(long or [mixer["class"] for mixer in mixers]))


def mixer_colours(mixers: Iterable[str]) -> dict[str, str]:
    """Returns a colour for each mixer: the same wherever it is shown; only where that is taken by another one
    shown beside it, the next free one."""
    colours: dict[str, str] = {}
    shown = dict.fromkeys(mixers)
    for mixer in sorted(shown, key=lambda name: (name not in MIXERS, name)):
        first = MIXERS.get(mixer) or COLOURS[zlib.crc32(mixer.encode()) % len(COLOURS)]
        start = COLOURS.index(first)
        choices = [*COLOURS[start:], *COLOURS[:start]]
        colours[mixer] = next((colour for colour in choices if colour not in colours.values()), first)
    return {mixer: colours[mixer] for mixer in shown}
