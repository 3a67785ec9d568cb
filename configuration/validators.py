"""Validators of one field, for `chz.field(default=..., validator=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recollect.configuration.base import UserError

Validator = Callable[[Any, str], None]


def requires(holds: Callable[[Any], bool], reason: str) -> Validator:
    """Returns a validator that raises UserError ("name=value: reason") unless `holds(value)`; None is always valid."""

    def validate(config: Any, name: str) -> None:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise UserError(f"{name}={value}: {reason}")

    return validate


def at_least(minimum: int) -> Validator:
    """Returns a validator of numbers that must be at least `minimum`."""
    return requires(lambda value: value >= minimum, f"must be at least {minimum}")
