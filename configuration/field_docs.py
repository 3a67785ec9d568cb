"""Every field of a config as `path=value` with its documentation, from the "Attributes:" of class docstrings."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import chz

from recollect.configuration.base import Config
from recollect.configuration.field_types import family_at, listed

_ENTRY = re.compile(r"^ {2}(\w+(?:, \w+)*): *(.*)$")


class Field(NamedTuple):
    """Holds one field of a config: its dotted path, its value as an override writes it, and its documentation in one
    line, "" where there is none."""

    path: str
    value: str
    text: str


def documented_fields(config: Config) -> list[Field]:
    """Returns every field of a config, those of configs in it after them. The lines `path=value` are overrides."""
    return list(_fields(config, config, ""))


def _fields(root: Config, config: Config, prefix: str) -> Iterator[Field]:
    texts = attribute_texts(type(config))
    for name, field in chz.chz_fields(config).items():
        value = getattr(config, name)
        text = texts.get(name) or _summary(type(value) if isinstance(value, Config) else _declaring(type(config), name))
        if typing.get_origin(field.final_type) is typing.Literal:
            text += f" ({', '.join(map(str, typing.get_args(field.final_type)))})"
        yield from _field(root, f"{prefix}{name}", value, text)


def _field(root: Config, path: str, value: Any, text: str) -> Iterator[Field]:
    others = [name for name in listed(family_at(root, path)).split(", ") if name and name != type(value).__name__]
    choice = f" ({', '.join(others)})" if others else ""
    if isinstance(value, Config):
        yield Field(path, type(value).__name__, text + choice)
        yield from _fields(root, value, f"{path}.")
    elif isinstance(value, tuple) and value and all(isinstance(item, Config) for item in value):
        for index, item in enumerate(value):
            yield from _field(root, f"{path}.{index}", item, _summary(type(item)))
    else:
        yield Field(path, _written(value), text + choice)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' if len(value) == 1 else ''})"
    return str(value)


def attribute_texts(cls: type[Config]) -> dict[str, str]:
    """Returns one sentence for each field that the docstrings of a class and its bases explain under "Attributes:", in
    an entry of its own or in backticks in that of another."""
    texts: dict[str, str] = {}
    for owner in cls.__mro__:
        if owner is not Config and issubclass(owner, Config):
            entries = _attributes(inspect.cleandoc(owner.__doc__ or ""))
            named = {name: text for text in entries.values() for name in re.findall(r"`(\w+)`", text)}
            texts = {**named, **entries, **texts}
    return texts


def _declaring(cls: type[Config], name: str) -> type[Config]:
    """Returns the class in the bases of `cls` that declares a field."""
    bases = [owner for owner in cls.__mro__ if owner is not Config and issubclass(owner, Config)]
    return next((owner for owner in bases if name in inspect.get_annotations(owner)), cls)


def _summary(cls: type[Config]) -> str:
    return first_sentence(inspect.cleandoc(cls.__doc__ or ""))


def _attributes(docstring: str) -> dict[str, str]:
    """Returns the first sentence of each entry under "Attributes:"."""
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.partition("\nAttributes:\n")[2].split("\n"):
        entry = _ENTRY.match(line)
        if entry:
            names = entry[1].split(", ")
            texts |= dict.fromkeys(names, entry[2])
        elif line.startswith("    ") and names:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        else:
            names = []
    return {name: first_sentence(text) for name, text in texts.items()}


def first_sentence(text: str) -> str:
    """Returns a text up to its first full stop before another sentence, without it, as one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[^.][.])\s(?=[A-Z])", paragraph)[0].removesuffix(".")
