"""Where prepared data is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns RECOLLECT_CACHE, else recollect/ in XDG_CACHE_HOME, else ~/.cache/recollect."""
    if os.environ.get("RECOLLECT_CACHE"):
        return Path(os.environ["RECOLLECT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recollect"
