"""The error of a full disk, and how to recognise it."""

from __future__ import annotations

import errno

from recollect.configuration.base import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large")


class DiskFull(UserError):
    """A file could not be written because the disk (or the quota) is full."""


def is_disk_full(error: BaseException | None) -> bool:
    """Returns whether an error, or one that caused it, says that no space is left.

    Storage libraries wrap the operating system's error in types of their own, so the text counts too.
    """
    while error is not None:
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if any(text in str(error) for text in _FULL_TEXT):
            return True
        error = error.__cause__ or error.__context__
    return False
