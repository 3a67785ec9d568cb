"""The text of a compiled program, taken apart: computations, their instructions, and the sizes of shapes."""

import collections
import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*->.*\{$")
_NESTED = functools.reduce(lambda inner, _: rf"(?:[^()]++|\({inner}\))*+", range(8), "[^()]*+")
"""Text with parentheses in it, up to eight deep."""
_LINE = re.compile(rf"^\s+(ROOT )?%?([\w.\-]+) = (\({_NESTED}\)|\S+) ([\w\-]+)\(({_NESTED})\)(.*)$")


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

    def attribute(self, name: str) -> str:
        """Text of an attribute: what stands within its braces or quotes, else up to the next comma; "" without it."""
        match = re.search(rf'\b{name}=(?:\{{([^}}]*)\}}|"?([^",\s]+))', self.attributes)
        return (match[1] or match[2] or "") if match else ""

    def called(self, *names: str) -> list[str]:
        """Computations that it names under any of these attributes."""
        return [found for name in names for found in re.findall(r"[\w.\-]+", self.attribute(name))]


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

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Number of a parameter -> instructions that take it, bitcasts of it looked through."""
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for found in self.instructions.values():
            for name in found.operands if found.opcode != "bitcast" else []:
                users[self.parameter(name)].append(found)
        return users

    def parameter(self, name: str) -> str:
        """The number of the parameter that an instruction is, or is a bitcast of; "" of any other."""
        found = self.behind_bitcasts(self.instructions[name]) if name in self.instructions else None
        return found.argument if found is not None and found.opcode == "parameter" else ""


def parse(text: str) -> dict[str, Computation]:
    """Returns all computations of a module by name."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation(header[2], bool(header[1]), {})
        elif current is not None and (found := _LINE.match(re.sub(r"/\*index=\d+\*/", "", line))):
            root, name, *rest = found.groups()
            current.instructions[name] = Instruction(name, bool(root), *rest)
    return computations


def bytes_of(shape: str, *, everywhere: bool = False) -> float:
    """Returns the bytes of a shape (a tuple: of all its elements) in main memory; `everywhere`: in fast memory too."""
    arrays = [array for array in _ARRAY.findall(shape) if everywhere or not re.search(r"S\([1-9]", array[2])]
    return sum((math.prod(integers(dims)) * _bits(kind) / 8 for kind, dims, _ in arrays), 0.0)


def dims_of(shape: str) -> list[int]:
    """Returns the dimensions of an array's shape."""
    inside = re.search(r"\[([\d,]*)\]", shape)
    return integers(inside[1]) if inside else []


def integers(text: str) -> list[int]:
    """Returns the numbers in a text like 1,2."""
    return [int(number) for number in re.findall(r"\d+", text)]


def _bits(kind: str) -> int:
    return _BITS.get(kind, 8 if kind.startswith("f8") else 4 if kind.startswith("f4") else 0)
