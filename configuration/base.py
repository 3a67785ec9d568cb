"""What every package needs: the base of config classes, validators of their fields, configs as JSON, errors, and the
public names of a package."""

from __future__ import annotations

import abc
import contextlib
import importlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import chz

Validator = Callable[[Any, str], None]
"""A check of one field, for `chz.field(default=..., validator=...)`."""


class UserError(ValueError):
    """A mistake in what the user asked for: `main.py` prints it as one `error:` line and exits with code 2."""


class Preempted(Exception):
    """The process was asked to end (SIGTERM) and has saved its work, which the same command continues: exit code 0."""


@chz.chz(typecheck=True)
class Config(abc.ABC):  # noqa: B024 - abstract methods are those of the bases that derive from it
    """Base of all config classes. One with an `abc.abstractmethod` is itself a base: it cannot be made or named.

    Subclasses are decorated with `@chz.chz(typecheck=True)`: frozen, keyword-only, every field checked against its
    annotation. They are found by class name (on the command line and in `config.json`), so names are unique in the
    project.
    """

    RETIRED: ClassVar[Mapping[str, str]] = {}  # fields of earlier versions, which saved configs may have: what to write


def requires(holds: Callable[[Any], bool], reason: str) -> Validator:
    """Returns a validator that raises UserError ("name=value: reason") unless `holds(value)`; None is always valid."""

    def validate(config: Any, name: str) -> None:
        value = getattr(config, name)
        with contextlib.suppress(TypeError):  # a value of another type: the check of annotations refuses it
            if value is not None and not holds(value):
                raise UserError(f"{name.removeprefix('X_')}={value}: {reason}")  # X_: chz's name of a field's value

    return validate


def at_least(minimum: int) -> Validator:
    """Returns a validator of numbers that must be at least `minimum`."""
    return requires(lambda value: value >= minimum, f"must be at least {minimum}")


SCHEMA_VERSION = 1


def to_json(config: Config) -> dict[str, Any]:
    """Returns a JSON-ready dict of class names and values, no code: `{"class": name, field: value, ...}` per config,
    `schema_version` in the outermost. Read back by deserialization.py."""
    return {"schema_version": SCHEMA_VERSION, **encoded(config)}


def encoded(value: Any) -> Any:
    """Returns a config, or the value of a field, as dicts, lists and plain values."""
    if isinstance(value, Config):
        fields = {name: encoded(getattr(value, name)) for name in chz.chz_fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [encoded(item) for item in value]
    if isinstance(value, dict):
        return {key: encoded(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a config cannot hold a {type(value).__name__}: {value!r}")


def exported_names(namespace: Mapping[str, Any]) -> list[str]:
    """Returns the names of the classes and functions in a package's `globals()` that its own modules define:
    `__all__` of a package to which one import line adds a name."""
    modules = f"{namespace['__name__']}."
    names = (name for name, value in namespace.items() if getattr(value, "__module__", "").startswith(modules))
    return sorted(name for name in names if not name.startswith("_"))


def lazy_names(package: str, modules: dict[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Returns `__getattr__` and `__all__` of a package (PEP 562) whose modules are imported when a name is asked for;
    `modules`: module within the package -> the names that it gives, separated by blanks."""
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return get, sorted(module_of)
