"""Old names of `host.Host`'s methods."""

from __future__ import annotations

from typing import Any

from recollect.training.distributed.host import current_host


def largest(value: int) -> int:
    return current_host().largest(value)


def from_main(value: int) -> int:
    return current_host().broadcast(value)


def whole(tree: Any) -> Any:
    return current_host().whole(tree)
