"""Event files for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recollect.configuration import UserError


class Board:
    """Writes event files into a folder.

    Raises:
      UserError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("run.tensorboard=True needs the package tensorboardX, which is not installed") from None
        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Writes the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(prefix + name, value, step)

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()
