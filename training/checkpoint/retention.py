"""Which checkpoints stay for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FirstOfEvery:
    """Orbax's policy for the first checkpoint at or after each multiple of `interval` steps."""

    def __init__(self, interval: int):
        self.interval = interval

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint, oldest first, whether it stays."""
        multiples = [info.step // self.interval for info in checkpoints]
        return [multiple > before for before, multiple in zip([0, *multiples], multiples, strict=False)]
