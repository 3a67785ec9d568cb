"""Where a session begins: fresh, or at the newest step that all its members have whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from recollect.training.run_folder import environment, same_bits_possible
from recollect.training.run_state import Member
from recollect.training.step import Program

Say = Callable[[str], None]


def start(members: list[Member], program: Program, say: Say) -> tuple[Any, int]:
    """State and step to go on from; the members take over what their checkpoints say, and their folders forget what
    came later.

    The state's arrays are loaded onto the devices that `program` keeps them on, whatever mesh, devices or processes
    saved them.

    Raises:
      UserError: all checkpoints of a member are damaged, or hold a state of another structure.
    """
    alone = program.population is None
    seeds = [member.experiment.run.seed for member in members]
    fresh = program.init(seeds[0] if alone else seeds)
    for member in members:
        member.folder.write_environment()
        member.checkpoints.recover(say)
    step = newest_common(members, say)
    if step is None:
        for member in members:
            member.folder.truncate_metrics(0)
            member.checkpoints.drop_after(-1)
        return fresh, 0
    wanted = shapes_of(fresh)
    del fresh  # what is loaded takes its place on the devices
    if alone:
        return load(members[0], step, wanted, say), step
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), wanted)
    own = [_own_step(member, step) for member in members]
    rows = [jax.device_get(load(member, at, one, say)) for member, at in zip(members, own, strict=True)]
    placed = jax.tree.map(lambda leaf, *leaves: jax.device_put(np.stack(leaves), leaf.sharding), wanted, *rows)
    return placed, max((at for member, at in zip(members, own, strict=True) if member.done is None), default=0)


def shapes_of(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state: what a checkpoint is loaded into."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def load(member: Member, step: int, wanted: Any, say: Say) -> Any:
    """One member's state of a step; what the folder holds of later steps goes away."""
    state, extra = member.checkpoints.load(step, wanted)
    member.restore(extra)
    member.folder.truncate_metrics(step)
    member.checkpoints.drop_after(step)
    changed = same_bits_possible(extra["environment"], environment())
    mesh = member.extra()["mesh"]
    moved = [f"{axis} {extra['mesh'][axis]} -> {mesh[axis]}" for axis in mesh if extra["mesh"][axis] != mesh[axis]]
    note = f"; on another mesh ({', '.join(moved)})" if moved else ""
    changed += ["mesh"] if moved else []
    note += f"; not promised to be bit-exact: {', '.join(changed)} changed" if changed else ""
    say(f"{member.folder.path}: resumed at step {step}{note}")
    return state


def newest_common(members: list[Member], say: Say) -> int | None:
    """The newest step at which all members have a whole checkpoint, None when they never had one. Damaged ones are
    set aside."""
    while True:
        common: set[int] = set.intersection(*(_resumable(member, members) for member in members))
        for member in members:
            member.checkpoints.refuse_if_all_damaged()
        if not common:
            return None
        step = max(common)
        whole = True
        for member in members:
            own = _own_step(member, step)
            problem = member.checkpoints.problem(own)
            if problem is not None:
                member.checkpoints.set_aside(own, problem, say)
                whole = False
        if whole:
            return step


def _resumable(member: Member, members: list[Member]) -> set[int]:
    """Steps a member can go on from. One that ended early can stand beside the others at any step."""
    steps = set(member.checkpoints.steps())
    if len(members) > 1 and member.result is not None and steps:
        return set().union(*(other.checkpoints.steps() for other in members))
    return steps


def _own_step(member: Member, common: int) -> int:
    steps = member.checkpoints.steps()
    return common if common in steps else max(steps)
