"""What a compiled GPU program moves: the launches of its entry computation, and the bytes of what they take and
give."""

from __future__ import annotations

from recollect.cost.hlo_parser import bytes_of, parse

FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all")


def of(text: str) -> tuple[int, float]:
    """Launches and bytes of a module's text. An array that one launch takes twice, under another shape too, counts
    once.

    Raises:
      ValueError: a loop or a branch, whose body this does not read.
    """
    entry = next(computation for computation in parse(text).values() if computation.entry)
    launches, moved = 0, 0.0
    for found in entry.instructions.values():
        if found.opcode in FREE or found.opcode.endswith("-done"):
            continue
        if found.opcode in ("while", "conditional", "call"):
            raise ValueError(f"{found.name} is a {found.opcode}, which is not read")
        taken = {
            entry.behind_bitcasts(entry.instructions[name]).name
            for name in found.operands
            if name in entry.instructions
        }
        given = found.parts[len(found.operands) :] if found.opcode.endswith("-start") else found.parts
        launches += 1
        moved += sum(bytes_of(entry.shape(name)) for name in taken) + sum(map(bytes_of, given))
    return launches, moved
