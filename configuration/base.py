"""The base of every config class, validators of its fields, and the one error type a user's mistake raises."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
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


def known_configs() -> dict[str, type[Config]]:
    """Returns the config classes that have been imported, by name.

    Raises:
      UserError: two imported config classes have the same name (a file given with `--with` may clash with the
        project's).
    """
    classes: dict[str, type[Config]] = {}
    pending = list(Config.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        other = classes.get(cls.__name__)
        if other is not None and other is not cls:
            raise UserError(
                f"two config classes are named {cls.__name__}: in {other.__module__} and in {cls.__module__}; "
                "rename one of them"
            )
        classes[cls.__name__] = cls
    return classes


def config_class(name: str) -> type[Config]:
    """Returns the config class called `name`.

    Raises:
      UserError: there is none; the nearest names are given. A name with ':' is refused: it would import and call
        anything.
    """
    classes = known_configs()
    if name in classes:
        return classes[name]
    if ":" in name:
        raise UserError(
            f"{name!r} names code by module, which is refused; give the class name of one of the project's configs"
        )
    raise UserError(f"there is no config class named {name!r}{nearest(name, classes)}")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns a did-you-mean ending for an error message, empty when nothing is close."""
    names = sorted(candidates)
    lowered = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)
    return "; did you mean " + " or ".join(lowered[match] for match in close) + "?" if close else ""


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


def exported_names(namespace: Mapping[str, Any]) -> list[str]:
    """Returns the names of the classes and functions in a package's `globals()` that its own modules define:
    `__all__` of a package to which one import line adds a name."""
    modules = f"{namespace['__name__']}."
    names = (name for name, value in namespace.items() if getattr(value, "__module__", "").startswith(modules))
    return sorted(name for name in names if not name.startswith("_"))
