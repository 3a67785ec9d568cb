"""The text of a compiled program, taken apart: computations, their instructions, and the sizes of shapes."""

from __future__ import annotations

import dataclasses
import functools
import re

_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. shape: as written; argument: what stands in its parentheses; attributes: what follows them."""

    name: str
    root: bool
    shape: str
    opcode: str
    argument: str
    attributes: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the instructions it takes."""
        return re.findall(r"%([\w.\-]+)", self.argument)

    @functools.cached_property
    def parts(self) -> list[str]:
        """Its shape, or a tuple's elements (inner tuples opened)."""
        return [found[0] for found in _ARRAY.finditer(self.shape)] if self.shape.startswith("(") else [self.shape]

    def called(self, *names: str) -> list[str]:
        """Computations that it names under any of these attributes."""
        found = []
        for name in names:
            match = re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            found += re.findall(r"%?([\w.\-]+)", match[1]) if match else []
        return found

    def numbers(self, name: str) -> list[int]:
        """An attribute like lhs_contracting_dims={1,2}."""
        match = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return [int(number) for number in match[1].split(",") if number] if match else []

    def text_of(self, name: str, *, braces: bool = False) -> str:
        """An attribute's text: up to the next comma, of a quoted one what is quoted, or within braces."""
        pattern = rf"\b{name}=\{{([^}}]*)\}}" if braces else rf'\b{name}="?([^",\s]+)'
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass
class Computation:
    """A computation: instructions by name, in order."""

    name: str
    entry: bool
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next(found for found in self.instructions.values() if found.root)

    def shape(self, name: str) -> str:
        """The shape of one of its instructions; "" for a name that is none."""
        return self.instructions[name].shape if name in self.instructions else ""

    def behind_bitcasts(self, found: Instruction) -> Instruction:
        """What a bitcast (or several) was made of."""
        while found.opcode == "bitcast" and found.operands and found.operands[0] in self.instructions:
            found = self.instructions[found.operands[0]]
        return found

    def users_of_parameter(self, index: int) -> list[Instruction]:
        """Instructions that take parameter `index`, bitcasts of it looked through."""
        return [
            user for name in self._names_of(index) for user in self._users.get(name, []) if user.opcode != "bitcast"
        ]

    def is_target(self, update: Instruction, index: int) -> bool:
        """Whether a dynamic-update-slice changes that parameter (and does not merely take it as the update)."""
        return update.operands[0] in self._names_of(index)

    def _names_of(self, index: int) -> set[str]:
        names = {
            found.name
            for found in self.instructions.values()
            if found.opcode == "parameter" and found.argument == str(index)
        }
        pending = list(names)
        while pending:
            for user in self._users.get(pending.pop(), []):
                if user.opcode == "bitcast" and user.name not in names:
                    names.add(user.name)
                    pending.append(user.name)
        return names

    @functools.cached_property
    def _users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for found in self.instructions.values():
            for name in found.operands:
                users.setdefault(name, []).append(found)
        return users


def parse(text: str) -> dict[str, Computation]:
    """Returns all computations of a module by name."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        header = _HEADER.match(line) if line and not line[0].isspace() else None
        if header is not None and "->" in line:
            current = computations[header[2]] = Computation(header[2], bool(header[1]), {})
        elif current is not None and line.startswith("}"):
            current = None
        elif current is not None:
            found = _instruction(line)
            if found is not None:
                current.instructions[found.name] = found
    return computations


def bytes_of(shape: str, *, everywhere: bool = False) -> float:
    """Returns the bytes of a shape (a tuple: of all its elements) in main memory; `everywhere`: in fast memory too."""
    total = 0.0
    for kind, dims, layout in _ARRAY.findall(shape):
        if not everywhere and re.search(r"S\([1-9]", layout):
            continue
        size = 1
        for dim in dims.split(","):
            size *= int(dim) if dim else 1
        total += size * _bits(kind) / 8
    return total


def _bits(kind: str) -> int:
    return _BITS.get(kind, 8 if kind.startswith("f8") else 4 if kind.startswith("f4") else 0)


def _instruction(line: str) -> Instruction | None:
    found = _LINE.match(line)
    if found is None:
        return None
    rest = re.sub(r"/\*index=\d+\*/", "", found[3])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    opening = call.find("(")
    if end <= 0 or opening < 0:
        return None
    closing = _closing(call, opening)
    return Instruction(
        found[2], bool(found[1]), shape, call[:opening], call[opening + 1 : closing], call[closing + 1 :]
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)
