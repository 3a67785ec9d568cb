"""Runs the laws of the mixer contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def all_laws() -> dict[str, Callable[[Any], None]]:
    """Returns the laws that a mixer is held to by name, in the order of their numbers: each takes a
    `layers.laws.Subject`, and raises AssertionError where it does not hold."""
    from recollect.export import laws as exported
    from recollect.layers import laws as alone
    from recollect.training import laws as trained

    laws = {**alone.LAWS, **trained.LAWS, **exported.LAWS}
    return dict(sorted(laws.items(), key=lambda item: int(item[0].split("_")[1])))
