"""Overrides that name classes: fields that a swapped class keeps, tuples that are written whole."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import chz
from chz.blueprint import Castable

from recollect.configuration.base import Config, UserError
from recollect.configuration.field_types import default_of, get_field, takes_text
from recollect.configuration.overrides import matches

Preset = dict[str, Any]
"""A config as chz's blueprint values: dotted path -> class or value."""


@dataclasses.dataclass(frozen=True)
class Swap:
    """Holds that the class at `path` was replaced, and which of its fields the new one took over or could not."""

    path: str
    before: type[Config]
    after: type[Config]
    kept: tuple[str, ...]
    lost: tuple[str, ...]

    def describe(self, config: Config, overrides: dict[str, Any]) -> str:
        """Returns what was kept and what has its default in the config that was made, as a line."""
        made = get_field(config, self.path)
        set_here = [name for name in chz.chz_fields(made) if any(matches(p, f"{self.path}.{name}") for p in overrides)]
        shown = {name: _shown(getattr(made, name)) for name in chz.chz_fields(made) if name not in set_here}
        parts = {
            "keeps": [f"{name}={value}" for name, value in shown.items() if name in self.kept],
            "defaults": [f"{name}={value}" for name, value in shown.items() if name not in self.kept],
            "without": list(self.lost),
        }
        listed = "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names)
        return f"{self.path}: {self.before.__name__} -> {self.after.__name__}: {listed or 'no fields'}"


def replace(preset: Preset, swapped: dict[str, Any], swaps: list[Swap], path: str, value: Any) -> Any:
    """Makes room in `preset` for a class, a config or None at `path`; returns what is to be set there. The fields of a
    config go to `swapped`, the swap of a class to `swaps`."""
    if isinstance(value, type):
        swaps += swap(preset, path, value)
        return value
    roots = [key for key in preset if matches(path, key)]
    for key in [key for key in preset if any(key == root or key.startswith(f"{root}.") for root in roots)]:
        del preset[key]  # fields of what stood there would be extraneous on what takes its place
    if isinstance(value, Config):
        fields = chz.beta_to_blueprint_values(value)
        swapped |= {f"{path}.{key}" if key else path: item for key, item in fields.items()}
        return type(value)
    return value


def swap(preset: Preset, pattern: str, after: type[Config]) -> list[Swap]:
    """Deletes from `preset` what a class that takes the place of others at `pattern` does not keep; returns the swaps.

    A field is kept where both classes have one of this name and type and the old value is not its class's default.
    """
    swaps = []
    for path in [key for key in preset if matches(pattern, key)]:
        before = preset[path]
        kept, lost = _kept_fields(preset, path, before, after) if _is_config(before) else ((), ())
        for key in [key for key in preset if key.startswith(f"{path}.")]:
            if before is not after and key[len(path) + 1 :].split(".")[0] not in kept:
                del preset[key]
        if _is_config(before) and before is not after:
            swaps.append(Swap(path, before, after, kept, lost))
        preset[path] = after
    return swaps


def _kept_fields(
    preset: Preset, path: str, before: type[Config], after: type[Config]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the fields that were set and that the new class has too, and those that it lacks."""
    old, new = chz.chz_fields(before), chz.chz_fields(after)
    changed = [name for name in old if _subtree(preset, f"{path}.{name}") != _values("", default_of(old[name]))]
    kept = [name for name in changed if name in new and new[name].final_type == old[name].final_type]
    return tuple(kept), tuple(name for name in changed if name not in kept)


def _subtree(preset: Preset, path: str) -> Preset:
    return {key[len(path) :]: preset[key] for key in preset if key == path or key.startswith(f"{path}.")}


def _values(path: str, value: Any) -> Preset:
    """Returns a value as chz's blueprint values, each below `path`."""
    if isinstance(value, Config):
        inner = chz.beta_to_blueprint_values(value)
        return {path: type(value)} | {f"{path}.{key}": item for key, item in inner.items() if key}
    if isinstance(value, tuple) and value and all(isinstance(item, Config) for item in value):
        return {
            key: inner for index, item in enumerate(value) for key, inner in _values(f"{path}.{index}", item).items()
        }
    return {path: value}


def _is_config(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Config)


def _shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, Config) else str(value)


def expanded(config: Config, preset: Preset, values: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` with tuples of classes, and classes with arguments, as one entry per class and argument:
    `pattern=(Attention, SlidingWindow(window=8))`. Elements that a tuple no longer has leave `preset`; where classes
    only change places, their fields go with them."""
    written: dict[str, Any] = {}
    for path, value in values.items():
        calls = _calls(value.value) if isinstance(value, Castable) else None
        if isinstance(calls, list):
            roots = {key.rpartition(".")[0] for key in preset if matches(f"{path}.0", key) and _is_config(preset[key])}
            roots |= {key for key in preset if matches(path, key) and preset[key] == ()}
            if not any(key == path or key.startswith(f"{path}.") for key in preset) and "..." not in path:
                roots.add(path)  # of an element that is new itself
            entries: dict[str, Any] = {}
            for root in roots:
                entries |= _rearranged(config, preset, root, calls)
            if not roots:
                entries = {path: value}
        elif calls is not None:
            name, arguments = calls
            entries = {path: Castable(name)} | {f"{path}.{key}": Castable(text) for key, text in arguments.items()}
        else:
            entries = {path: _without_brackets(config, path, value)}
        written |= entries if entries.keys() == {path} else expanded(config, preset, entries)
    return written


def _rearranged(config: Config, preset: Preset, root: str, calls: list[tuple[str, dict[str, str]]]) -> dict[str, Any]:
    """Puts the elements that stay into their places in `preset`; returns the entries of the others."""
    before: dict[int, Preset] = {}
    while (index := len(before)) >= 0 and f"{root}.{index}" in preset:
        before[index] = _subtree(preset, f"{root}.{index}")
    for key in [key for key in preset if key.startswith(f"{root}.")]:
        del preset[key]
    if not calls:
        preset.pop(root, None)
        return {root: ()}
    left = dict(before)
    entries: dict[str, Any] = {}
    for index, (name, arguments) in enumerate(calls):
        same = [place for place in (index, *left) if place in left and left[place][""].__name__ == name]
        source = left.pop(same[0]) if same else before.get(index, {})
        preset |= {f"{root}.{index}{tail}": value for tail, value in source.items()}
        entries[f"{root}.{index}"] = Castable(name)
        entries |= {f"{root}.{index}.{key}": Castable(text) for key, text in arguments.items()}
    return entries


def _calls(text: str) -> list[tuple[str, dict[str, str]]] | tuple[str, dict[str, str]] | None:
    """Returns the names and arguments in "(A, B(x=1))", or those of "A(x=1)"; None for other texts. Nothing is run."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if isinstance(node, ast.Tuple | ast.List):
        calls = [_call(item) for item in node.elts]
        return None if None in calls else [call for call in calls if call is not None]
    inner = _call(node)
    if isinstance(node, ast.Name) and text.strip().startswith("("):
        return [inner] if inner else None  # "(A)" is meant as a tuple
    return inner if isinstance(node, ast.Call) else None


def _without_brackets(config: Config, path: str, value: Any) -> Any:
    """Returns a tuple of numbers, "(2, 4)", in the form in which chz reads one: "2,4"; other values as they are."""
    try:
        numbers = ast.literal_eval(value.value.strip()) if isinstance(value, Castable) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return value
    if not isinstance(numbers, tuple) or not numbers or takes_text(config, path):
        return value
    return Castable(",".join(map(str, numbers)))


def _call(node: ast.AST) -> tuple[str, dict[str, str]] | None:
    if isinstance(node, ast.Name) and node.id[:1].isupper():
        return node.id, {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id[:1].isupper():
        arguments = {str(keyword.arg): _text(keyword.value) for keyword in node.keywords}
        if len(arguments) < len(node.keywords):
            raise UserError(f"{ast.unparse(node)}: a field is set twice")
        return None if node.args or "None" in arguments else (node.func.id, arguments)  # **x has no name
    return None


def _text(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def open_tuples(preset: Preset, swapped: dict[str, Any], path: str, value: Any) -> None:
    """Makes room for an element at `path`: chz takes elements only where no value () of the whole tuple stands.

    Raises:
      UserError: the element would leave a gap behind the end of its tuple.
    """
    parts = path.split(".")
    for end in range(1, len(parts)):
        above, last = ".".join(parts[:end]), parts[end]
        if preset.get(above) == ():
            del preset[above]
        known = preset.keys() | swapped.keys()
        if last.isdigit() and f"{above}.0" in known and f"{above}.{last}" not in known:
            length = next(index for index in range(int(last) + 1) if f"{above}.{index}" not in known)
            if int(last) > length:
                shown = value.value if isinstance(value, Castable) else value
                have = f"it has {length}, and the next one is {above}.{length}"
                raise UserError(f"{path}={shown}: {above} has no element {last!r}; {have}")
