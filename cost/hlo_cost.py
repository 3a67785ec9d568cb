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

import dataclasses
import functools
import math
import re

from recollect.cost.hlo_parser import Computation, Instruction, bytes_of, parse

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_FREE = {
    *(
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "while",
        "call",
        "conditional",
        "after-all",
        "partition-id",
        "replica-id",
    ),
    *("opt-barrier", "async-start", "async-update", "async-done", "copy-done", "iota", "add-dependency", "domain"),
}
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind. sent: bytes that leave a device when they run as rings."""

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
    """What a call of a program does on one device.

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
        kinds = {*self.collectives, *other.collectives}
        none = Traffic()
        return Work(
            self.products + times * other.products,
            self.bytes + times * other.bytes,
            self.cycles + times * other.cycles,
            {
                kind: self.collectives.get(kind, none).plus(other.collectives.get(kind, none), times)
                for kind in sorted(kinds)
            },
            self.silent_kernels + times * other.silent_kernels,
            self.unknown_loops + times * other.unknown_loops,
        )


def work_of(text: str) -> Work:
    """The work of one call of the program with this HLO (`compiled.as_text()`)."""
    return _Reader(parse(text)).entry()


class _Reader:
    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations
        self._known: dict[tuple[str, bool], Work] = {}

    def entry(self) -> Work:
        return self._work(
            next(name for name, computation in self.computations.items() if computation.entry), fused=False
        )

    def _work(self, name: str, fused: bool) -> Work:
        if (name, fused) not in self._known:
            total = Work()
            for instruction in self.computations[name].instructions.values():
                total = total.plus(self._of(instruction, self.computations[name], fused))
            self._known[name, fused] = total
        return self._known[name, fused]

    def _of(self, instruction: Instruction, inside: Computation, fused: bool) -> Work:
        instruction = _waited_for(instruction)
        opcode = instruction.opcode
        if opcode == "while":
            return self._loop(instruction)
        if opcode == "conditional":
            branches = [
                self._work(name, fused)
                for name in instruction.called("branch_computations", "true_computation", "false_computation")
            ]
            return max(branches, key=lambda work: (work.products, work.bytes), default=Work())
        if opcode in ("call", "async-start"):
            return functools.reduce(
                Work.plus,
                (self._work(name, fused) for name in instruction.called("to_apply", "calls", "called_computation")),
                Work(),
            )
        inner = Work()
        if opcode == "fusion":
            inner = functools.reduce(Work.plus, (self._work(name, True) for name in instruction.called("calls")), inner)
        kind = opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            inner = inner.plus(Work(collectives=_traffic(kind, instruction, inside)))
        silent = 0.0
        products = (
            _dot(instruction, inside)
            if opcode == "dot"
            else _convolution(instruction, inside)
            if opcode == "convolution"
            else 0.0
        )
        if opcode == "custom-call":
            estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
            target = instruction.text_of("custom_call_target")
            products = (
                float(estimate[1]) if estimate else _library_product(instruction, inside) if "gemm" in target else 0.0
            )
            silent = float(not estimate and target.startswith(_KERNELS))
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        alone = Work(
            products,
            0.0 if fused else self._bytes(instruction, inside),
            float(cycles[1]) if cycles and not fused else 0.0,
            {},
            silent,
        )
        return inner.plus(alone)

    def _loop(self, instruction: Instruction) -> Work:
        (body,), (condition,) = instruction.called("body"), instruction.called("condition")
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
        turns = float(known[1]) if known else self._turns(self.computations[condition])
        each = self._work(body, False).plus(self._work(condition, False))
        return Work(unknown_loops=float(turns is None)).plus(each, 1.0 if turns is None else turns)

    def _turns(self, condition: Computation) -> float | None:
        """Of a loop that counts from 0 by 1 until a constant, which is how scans are lowered."""
        root = condition.root
        if root.opcode == "fusion":  # wrapped_compare
            inner = self.computations[root.called("calls")[0]].root
            if "direction=LT" not in inner.attributes:
                return None
        elif root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limits = [condition.instructions[name] for name in root.operands if name in condition.instructions]
        constants = [limit.argument for limit in limits if limit.opcode == "constant"]
        return float(constants[0]) if len(constants) == 1 and constants[0].isdigit() else None

    def _bytes(self, instruction: Instruction, inside: Computation) -> float:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return 0.0
        shapes = [inside.shape(name) for name in instruction.operands]
        if opcode in ("dynamic-slice", "slice", "gather"):
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
        for index, shape in enumerate(shapes):
            users = inner.users_of_parameter(index)
            if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
                total += min(bytes_of(shape), sum(bytes_of(user.shape) for user in users))
            elif not (
                users and all(user.opcode == "dynamic-update-slice" and inner.is_target(user, index) for user in users)
            ):
                total += bytes_of(shape)
        return total + sum(
            min(bytes_of(part), written)
            for part, written in zip(instruction.parts, self._written(inner, instruction.parts), strict=True)
        )

    @staticmethod
    def _written(inner: Computation, parts: list[str]) -> list[float]:
        """Bytes that a fusion writes to each of its results: of one updated in place, the update."""
        roots = (
            [inner.root] if inner.root.opcode != "tuple" else [inner.instructions[name] for name in inner.root.operands]
        )
        if len(roots) != len(parts):
            return [bytes_of(part) for part in parts]
        updates = [inner.behind_bitcasts(root) for root in roots]
        return [
            bytes_of(inner.shape(root.operands[1])) if root.opcode == "dynamic-update-slice" else math.inf
            for root in updates
        ]


def _waited_for(instruction: Instruction) -> Instruction:
    """Of a fusion that is started here and waited for elsewhere, as jax 0.11's compiler for GPUs has them, the fusion:
    `fusion-start` has the shape ((operands), result, context)."""
    if instruction.opcode != "fusion-start":
        return instruction
    return dataclasses.replace(
        instruction, opcode="fusion", shape=f"({', '.join(instruction.parts[len(instruction.operands) : -1])})"
    )


def _traffic(kind: str, instruction: Instruction, inside: Computation) -> dict[str, Traffic]:
    count = len(instruction.operands)
    if instruction.opcode == "all-gather-start":
        parts = instruction.parts[count : 2 * count] or instruction.parts
    elif instruction.opcode == "collective-permute-start":
        parts = instruction.parts[1:2]
    elif kind == "reduce-scatter":
        parts = [inside.shape(name) for name in instruction.operands]
    else:
        parts = instruction.parts
    if kind == "all-reduce" and inside.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # as TPUs fuse it
    size = sum(bytes_of(part, everywhere=True) for part in parts)
    group = group_size(instruction.attributes)
    share = 1.0 if kind.startswith("collective") else (group - 1) / group * (2.0 if kind == "all-reduce" else 1.0)
    return {kind: Traffic(1, size, share * size)}


def group_size(attributes: str) -> int:
    """Devices that take part in one collective; groups are listed, counted ([groups, devices]) or axes of a mesh, or
    parts of axes."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if counted:
        return int(counted[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if mesh is None:
        return 1
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]))


def _dims(shape: str) -> list[int]:
    inside = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in inside[1].split(",") if size] if inside else []


def _dot(instruction: Instruction, inside: Computation) -> float:
    left = _dims(inside.shape(instruction.operands[0]))
    contracted = instruction.numbers("lhs_contracting_dims")
    return 2.0 * math.prod(_dims(instruction.shape)) * math.prod(left[axis] for axis in contracted)


def _library_product(instruction: Instruction, inside: Computation) -> float:
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    if contracted is None:
        return 0.0
    left = _dims(inside.shape(instruction.operands[0]))
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])]
    return 2.0 * math.prod(_dims(instruction.parts[0])) * math.prod(left[axis] for axis in axes)


def _convolution(instruction: Instruction, inside: Computation) -> float:
    """Twice the products that fall on input: TPUs write batched products as convolutions over padding."""
    layout = instruction.text_of("dim_labels")
    (inputs, kernel), result = layout.split("->")[0].split("_"), layout.split("->")[1]
    x, k = (_dims(inside.shape(name)) for name in instruction.operands[:2])
    y = _dims(instruction.shape)
    window = instruction.text_of("window", braces=True)
    spatial = sorted(set(kernel) - set("io"))
    settings = {
        name: re.search(rf"\b{name}=([\w\-x]+)", window) for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")
    }

    def setting(name: str, axis: int, default: str) -> str:
        match = settings[name]
        return match[1].split("x")[axis] if match else default

    pairs = 1.0
    for axis, label in enumerate(spatial):
        size, taps, outputs = x[inputs.index(label)], k[kernel.index(label)], y[result.index(label)]
        stride, low = int(setting("stride", axis, "1")), int(setting("pad", axis, "0_0").split("_")[0])
        apart, between = int(setting("lhs_dilate", axis, "1")), int(setting("rhs_dilate", axis, "1"))
        pairs *= _pairs(size, taps, outputs, stride, low, apart, between)
    return 2.0 * y[result.index("b")] * y[result.index("f")] * k[kernel.index("i")] * pairs


@functools.lru_cache(maxsize=1024)
def _pairs(size: int, taps: int, outputs: int, stride: int, low: int, apart: int, between: int) -> float:
    """How many (output, tap) pairs along one dimension meet an input."""
    if taps == 1 and low == 0 and apart == 1:
        return float(outputs)
    reach = (size - 1) * apart
    places = (output * stride + tap * between - low for output in range(outputs) for tap in range(taps))
    return float(sum(0 <= place <= reach and place % apart == 0 for place in places))
