"""What a field of a config takes: its value, its annotation, and the config classes that may stand there."""

from __future__ import annotations

import contextlib
import inspect
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any

import chz
from chz.util import MISSING

from recollect.configuration.base import Config, UserError
from recollect.configuration.field_hints import class_hint
from recollect.configuration.names import known_configs, nearest


def get_field(config: Config, path: str) -> Any:
    """Returns the value at a dotted path.

    Raises:
      UserError: there is no such field.
    """
    value: Any = config
    seen: list[str] = []
    for name in path.split("."):
        fields = chz.chz_fields(value) if chz.is_chz(value) else {}
        if isinstance(value, tuple) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif name in fields:
            value = getattr(value, name)
        else:
            where = ".".join(seen) or "the experiment"
            raise UserError(f"{path}: {where} has no field {name!r}{nearest(name, fields)}")
        seen.append(name)
    return value


def family_at(config: Config, path: str) -> tuple[type[Config], ...]:
    """Returns the config classes that the field at `path` is declared with; () for other fields and unknown ones."""
    return tuple(_config_types(_annotation(config, path)))


def _annotation(config: Config, path: str) -> Any:
    """Returns what the field at `path` is declared with, for an element what its tuple is; None for unknown ones."""
    parent, _, name = path.rpartition(".")
    try:
        owner = get_field(config, parent) if parent else config
        if isinstance(owner, tuple):
            parent, _, name = parent.rpartition(".")
            owner = get_field(config, parent) if parent else config
        return chz.chz_fields(owner)[name].final_type
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def takes_text(config: Config, path: str) -> bool:
    """Returns whether the field at `path` takes any text; False for unknown ones."""
    annotation = _annotation(config, path)
    return str in (annotation, *typing.get_args(annotation))


def default_of(field: Any) -> Any:
    """Returns the default of a field of `chz_fields`; chz's MISSING where it has none."""
    return field._default if field._default_factory is MISSING else field._default_factory()


def expected(config: Config, path: str) -> str:
    """Returns the values that the field at `path` takes in words: "a whole number such as 1000"."""
    current = None
    with contextlib.suppress(UserError):
        current = get_field(config, path)
    return " or ".join(dict.fromkeys(_in_words(_annotation(config, path), current)))


def _in_words(annotation: Any, current: Any) -> Iterator[str]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        for part in typing.get_args(annotation):
            yield from _in_words(part, current)
    elif typing.get_origin(annotation) is typing.Literal:
        yield " or ".join(map(str, typing.get_args(annotation)))
    elif typing.get_origin(annotation) is tuple:
        numbers = {int: " of whole numbers", float: " of numbers"}.get(typing.get_args(annotation)[0])
        yield f"a tuple{numbers}, written (2, 4)" if numbers else "a tuple, written (a, b)"
    elif annotation in (int, float):
        example = f" such as {current}" if type(current) in (int, float) else ""
        yield ("a whole number" if annotation is int else "a number") + example
    else:
        yield {bool: "True or False", str: "text", types.NoneType: "None"}.get(annotation, str(annotation))


def _config_types(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (tuple, typing.Union):
        for part in typing.get_args(annotation):
            yield from _config_types(part)


def listed(family: tuple[type[Config], ...]) -> str:
    """Returns the names of a family's classes. Bases are left out: abstract ones, and those that others derive from
    and that have no fields."""
    classes = [cls for base in family for cls in known_configs().values() if issubclass(cls, base)]
    return ", ".join(sorted({cls.__name__ for cls in classes if not _is_base(cls, classes)}))


def _is_base(cls: type[Config], family: Collection[type[Config]]) -> bool:
    derived = any(issubclass(other, cls) and other is not cls for other in family)
    return inspect.isabstract(cls) or (derived and not chz.chz_fields(cls))


def class_at(config: Config, path: str, place: str, text: str) -> type[Config]:
    """Returns the class called `text` of the family that the field at `place` takes; errors begin with `path`.

    Raises:
      UserError: there is none; those that there are follow.
    """
    classes = known_configs()
    family = family_at(config, place)
    names = listed(family or (Config,)).split(", ")
    if text in names:
        return classes[text]
    what = " or ".join(base.__name__ for base in family) or "config"
    why = f"there is no config class named {text!r}"
    called, bracket, rest = text.partition("(")
    if bracket and text.count("(") != text.count(")"):
        raise UserError(f"{path}={text}: a bracket is not closed")
    if bracket and called in names and (fields := list(chz.chz_fields(classes[called]))):
        example = f"{called}({fields[0]}={rest.partition(',')[0].rstrip(')')})"
        raise UserError(f"{path}={text}: values of a class are written with their names, such as {example}")
    if text in classes:
        is_base = _is_base(classes[text], classes.values())
        why = f"{text} is a base of classes" if is_base else f"{text} is no {what}"
    elif ":" in text:
        why = "a value that names code by module is refused"
    there = f"there are {', '.join(names)}" if len(names) > 1 else f"it takes a {names[0]} only"
    raise UserError(f"{path}={text}: {why}{class_hint(text, names)}; {there}")
