"""Config classes by name, and what the user may have meant where there is none."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterable

from recollect.configuration.base import Config, UserError

RETIRED: weakref.WeakSet[type[Config]] = weakref.WeakSet()
"""Classes of files of the user's that have been unloaded (python_files.py)."""


def known_configs() -> dict[str, type[Config]]:
    """Returns the config classes that have been imported, by name.

    Raises:
      UserError: two imported config classes have the same name (one of a user's file may clash with the project's).
    """
    classes: dict[str, type[Config]] = {}
    pending = list(Config.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls in RETIRED:
            continue
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
    lowered = {candidate.lower(): candidate for candidate in sorted(candidates)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)
    return "; did you mean " + " or ".join(lowered[match] for match in close) + "?" if close else ""
