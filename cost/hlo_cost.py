"""What one call of a compiled program does, read from the text of its HLO: products, bytes, collectives, cycles; a
loop's body as often as it runs.

XLA's own cost analysis counts every loop's body once, and reports nothing at all for GPUs that are only compiled for.
Counts are of one device.

- Products: dot, convolution (without what falls on padding), cuBLAS calls, and what TPU kernels report. GPU kernels
  report nothing: their calls are counted instead.
- Bytes: what instructions outside of fusions read and write in the chip's main memory; a slice of an array counts as
  its slice, an update in place as the update. Arrays that the TPU compiler keeps in the chip's fast memory (S(1) and
  above in a layout) do not count.
- Collectives: kind, calls, bytes of their results (of a reduce-scatter: of what it reduces), and the bytes that a ring
sends for them.
- Cycles: the TPU compiler's own estimates of its fusions and copies. It gives none for kernels and collectives.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable

from recollect.cost.hlo_parser import Computation, Instruction, bytes_of, dims_of, integers, parse

_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "copy-done", "iota"),
    *("add-dependency", "domain"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
_WINDOW = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
"""Settings of a convolution along one dimension, and what they are where its window does not name them."""
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Counts collectives of one kind. sent: bytes that leave a device when they run as rings."""

    calls: float = 0
    bytes: float = 0
    sent: float = 0

    def plus(self, other: Traffic, times: float = 1) -> Traffic:
        """Returns the sum of both, the other one counted `times` times."""
        return Traffic(
            self.calls + times * other.calls, self.bytes + times * other.bytes, self.sent + times * other.sent
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """Counts what a call of a program does on one device.

    Attributes:
      products: floating-point operations.
      bytes: read and written in main memory.
      cycles: by the compiler's estimate; 0 where it gives none.
      collectives: by kind.
      silent_kernels: calls of kernels whose products are not known.
      unknown_loops: loops without a length in the text, counted as one turn.
    """

    products: float = 0
    bytes: float = 0
    cycles: float = 0
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    silent_kernels: float = 0
    unknown_loops: float = 0

    def plus(self, other: Work, times: float = 1) -> Work:
        """Returns the sum of both, the other one counted `times` times."""
        here, there = (collections.defaultdict(Traffic, work.collectives) for work in (self, other))
        return Work(
            self.products + times * other.products,
            self.bytes + times * other.bytes,
            self.cycles + times * other.cycles,
            {kind: here[kind].plus(there[kind], times) for kind in sorted(here.keys() | there.keys())},
            self.silent_kernels + times * other.silent_kernels,
            self.unknown_loops + times * other.unknown_loops,
        )


def work_of(text: str) -> Work:
    """Returns the work of one call of the program with this HLO (`compiled.as_text()`)."""
    computations = parse(text)
    return _Reader(computations).work(next(name for name, found in computations.items() if found.entry))


def _sum(works: Iterable[Work]) -> Work:
    return functools.reduce(Work.plus, works, Work())


class _Reader:
    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations
        self._known: dict[tuple[str, bool], Work] = {}

    def work(self, name: str, fused: bool = False) -> Work:
        """Returns the work of one call of a computation; within a fusion nothing touches main memory."""
        if (name, fused) not in self._known:
            inside = self.computations[name]
            self._known[name, fused] = _sum(self._of(found, inside, fused) for found in inside.instructions.values())
        return self._known[name, fused]

    def _of(self, instruction: Instruction, inside: Computation, fused: bool) -> Work:
        instruction = _waited_for(instruction)
        opcode = instruction.opcode
        if opcode == "while":
            return self._loop(instruction)
        if opcode == "conditional":
            branches = instruction.called("branch_computations", "true_computation", "false_computation")
            works = (self.work(name, fused) for name in branches)
            return max(works, key=lambda work: (work.products, work.bytes), default=Work())
        if opcode in ("call", "async-start"):
            return _sum(
                self.work(name, fused) for name in instruction.called("to_apply", "calls", "called_computation")
            )
        inner = _sum(self.work(name, True) for name in instruction.called("calls")) if opcode == "fusion" else Work()
        products = _PRODUCTS[opcode](instruction, inside) if opcode in _PRODUCTS else 0.0
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        alone = Work(
            products=products or 0.0,
            bytes=0.0 if fused else self._bytes(instruction, inside),
            cycles=float(cycles[1]) if cycles and not fused else 0.0,
            collectives=_traffic(instruction, inside),
            silent_kernels=float(products is None),
        )
        return inner.plus(alone)

    def _loop(self, instruction: Instruction) -> Work:
        (body,), (condition,) = instruction.called("body"), instruction.called("condition")
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
        turns = float(known[1]) if known else self._turns(self.computations[condition])
        each = self.work(body).plus(self.work(condition))
        return Work(unknown_loops=float(turns is None)).plus(each, 1.0 if turns is None else turns)

    def _turns(self, condition: Computation) -> float | None:
        """Of a loop that counts from 0 by 1 until a constant, which is how scans are lowered."""
        root, known = condition.root, condition.instructions
        compare = self.computations[root.called("calls")[0]].root if root.opcode == "fusion" else root
        operands = (known[name] for name in root.operands if name in known)
        constants = [operand.argument for operand in operands if operand.opcode == "constant"]
        counts = "direction=LT" in compare.attributes and len(constants) == 1 and constants[0].isdigit()
        return float(constants[0]) if counts else None

    def _bytes(self, instruction: Instruction, inside: Computation) -> float:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return 0.0
        shapes = [inside.shape(name) for name in instruction.operands]
        if opcode in _SLICES:
            return 2.0 * bytes_of(instruction.shape)
        if opcode == "dynamic-update-slice":
            return 2.0 * bytes_of(shapes[1])
        if opcode == "copy-start":
            return bytes_of(instruction.parts[0]) + bytes_of(shapes[0])
        if opcode == "fusion":
            return self._fusion_bytes(instruction, shapes)
        return bytes_of(instruction.shape) + sum(bytes_of(shape) for shape in shapes)

    def _fusion_bytes(self, instruction: Instruction, shapes: list[str]) -> float:
        inner = self.computations[instruction.called("calls")[0]]
        total = 0.0
        for index, shape in enumerate(map(bytes_of, shapes)):
            users = inner.users[str(index)]
            updated = [
                user.opcode == "dynamic-update-slice" and inner.parameter(user.operands[0]) == str(index)
                for user in users
            ]
            if users and all(user.opcode in _SLICES for user in users):
                total += min(shape, sum(bytes_of(user.shape) for user in users))
            elif not users or not all(updated):
                total += shape
        written = self._written(inner, instruction.parts)
        return total + sum(min(bytes_of(part), size) for part, size in zip(instruction.parts, written, strict=True))

    @staticmethod
    def _written(inner: Computation, parts: list[str]) -> list[float]:
        """Bytes that a fusion writes to each of its results: of one updated in place, the update."""
        root = inner.root
        roots = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(roots) != len(parts):
            return [math.inf] * len(parts)
        return [
            bytes_of(inner.shape(made.operands[1])) if made.opcode == "dynamic-update-slice" else math.inf
            for made in map(inner.behind_bitcasts, roots)
        ]


def _waited_for(instruction: Instruction) -> Instruction:
    """Of a fusion that is started here and waited for elsewhere, as jax 0.11's compiler for GPUs has them, the fusion:
    `fusion-start` has the shape ((operands), result, context)."""
    if instruction.opcode != "fusion-start":
        return instruction
    results = instruction.parts[len(instruction.operands) : -1]
    return dataclasses.replace(instruction, opcode="fusion", shape=f"({', '.join(results)})")


def _traffic(instruction: Instruction, inside: Computation) -> dict[str, Traffic]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return {}
    parts, count = instruction.parts, len(instruction.operands)
    if instruction.opcode == "all-gather-start":
        parts = parts[count : 2 * count] or parts
    elif instruction.opcode == "collective-permute-start":
        parts = parts[1:2]
    elif kind == "reduce-scatter":
        parts = [inside.shape(name) for name in instruction.operands]
    if kind == "all-reduce" and inside.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # as TPUs fuse it
    size = sum(bytes_of(part, everywhere=True) for part in parts)
    group = group_size(instruction.attributes)
    share = 1.0 if kind.startswith("collective") else (group - 1) / group * (2.0 if kind == "all-reduce" else 1.0)
    return {kind: Traffic(1, size, share * size)}


def group_size(attributes: str) -> int:
    """Devices that take part in one collective; groups are listed, counted ([groups, devices]) or axes of a mesh, or
    parts of axes."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if mesh is None:
        return 1
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]))


def _dot(instruction: Instruction, inside: Computation) -> float:
    """Of a product, or of a call of cuBLAS, which states the contracted dimensions in its config."""
    contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^}\]]*)', instruction.attributes)
    if contracted is None:
        return 0.0
    left = dims_of(inside.shape(instruction.operands[0]))
    return 2.0 * math.prod(dims_of(instruction.parts[0])) * math.prod(left[axis] for axis in integers(contracted[1]))


def _custom_call(instruction: Instruction, inside: Computation) -> float | None:
    """None of a kernel that does not report its products."""
    estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
    target = instruction.attribute("custom_call_target")
    if estimate is None and target.startswith(_KERNELS):
        return None
    return float(estimate[1]) if estimate else _dot(instruction, inside) if "gemm" in target else 0.0


def _convolution(instruction: Instruction, inside: Computation) -> float:
    """Twice the products that fall on input: TPUs write batched products as convolutions over padding."""
    inputs, kernel, result = re.split("_|->", instruction.attribute("dim_labels"))
    x, k = (dims_of(inside.shape(name)) for name in instruction.operands[:2])
    y = dims_of(instruction.shape)
    window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute("window")))
    pairs = 1.0
    for axis, label in enumerate(sorted(set(kernel) - set("io"))):
        of = {name: text.split("x")[axis].split("_")[0] for name, text in window.items()}
        settings = [int(of.get(name, default)) for name, default in _WINDOW.items()]
        pairs *= _pairs(x[inputs.index(label)], k[kernel.index(label)], y[result.index(label)], *settings)
    return 2.0 * y[result.index("b")] * y[result.index("f")] * k[kernel.index("i")] * pairs


@functools.lru_cache(maxsize=1024)
def _pairs(size: int, taps: int, outputs: int, stride: int, low: int, apart: int, between: int) -> float:
    """How many (output, tap) pairs along one dimension meet an input."""
    if taps == 1 and low == 0 and apart == 1:
        return float(outputs)
    reach = (size - 1) * apart
    places = (output * stride + tap * between - low for output in range(outputs) for tap in range(taps))
    return float(sum(0 <= place <= reach and place % apart == 0 for place in places))


_PRODUCTS = {"dot": _dot, "convolution": _convolution, "custom-call": _custom_call}
"""Floating-point operations of an instruction, by its opcode."""
