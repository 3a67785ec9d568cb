"""The base of every config class, validators of its fields, and the one error type a user's mistake raises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import chz

Validator = Callable[[Any, str], None]
"""A check of one field, for `chz.field(default=..., validator=...)`."""


class UserError(ValueError):
    """A mistake in what the user asked for: `main.py` prints it as one `error:` line and exits with code 2."""


class Preempted(Exception):
    """The process was asked to end (SIGTERM) and has saved its work, which the same command continues.

    `main.py` exits with code 0.
    """


@chz.chz(typecheck=True)
class Config:
    """Base of all config classes.

    Subclasses are decorated with `@chz.chz(typecheck=True)`: frozen, keyword-only, every field checked against its
    annotation. They are found by class name (on the command line and in `config.json`), so names are unique in the
    project.
    """


def requires(holds: Callable[[Any], bool], reason: str) -> Validator:
    """Returns a validator that raises UserError ("name=value: reason") unless `holds(value)`; None is always valid."""

    def validate(config: Any, name: str) -> None:
        value = getattr(config, name)
        with contextlib.suppress(TypeError):  # a value of another type: the check of annotations refuses it
            if value is not None and not holds(value):
                raise UserError(f"{name}={value}: {reason}")

    return validate


def at_least(minimum: int) -> Validator:
    """Returns a validator of numbers that must be at least `minimum`."""
    return requires(lambda value: value >= minimum, f"must be at least {minimum}")


def exported_names(namespace: Mapping[str, Any]) -> list[str]:
    """Returns the names of the classes and functions in a package's `globals()` that its own modules define:
    `__all__` of a package to which one import line adds a name."""
    modules = f"{namespace['__name__']}."
    names = (name for name, value in namespace.items() if getattr(value, "__module__", "").startswith(modules))
    return sorted(name for name in names if not name.startswith("_"))
