"""The kernel behind gpu.py: one thread block of one or two warpgroups, walking from chunk to chunk.

The state stays in registers in fp32; products read its bf16 copy in shared memory. While a chunk is computed, the copies of the next one
fly into the other stage, if there is one. In a chunk, with S the copy:

    y = v - w S                                       delta rule alone; else y = v
    P = mask(q k^T) weighted by pairs                 gpu_decay.py where the decay has channels
    o = scale (reads . q S + P y)                     q S runs while P is weighted
    state = keep . state + k^T (writes . y)           writes . y takes the place of v in its stage

Shared memory is filled from registers in three batches a chunk, each made visible to the tensor cores (committed) before it is read:
S; P; and writes . y together with o, which takes the place of P where they have one size. Decays by channel take more (gpu_decay.py):
there queries and keys are weighted in their stages, most of the work, which two warpgroups with columns of their own share at size 128.

Time may be cut in pieces, each with thread blocks of its own. Where pieces end, states are found first, by the same steps with neither
q nor o (`states_only`), of all pieces but the last, from S = 0. With the delta rule a piece's last state is linear in its first, S' = T S + ...:
more blocks of columns, which start from the identity and write no v, leave T.

Registers are what binds (255 a thread). A product's operands are named by descriptors, which the compiler makes outside the loop and
keeps, two registers each, wherever an address does not vary: so work space is indexed by a zero read from memory (`nought`). Shared
memory holds two blocks a core in plain walks of size 128 with no decay, one a head or one a value channel, and without dots; else one.
Not timed on a device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.linear_recurrence import gpu_decay
from pallas_kernels.linear_recurrence.walks import Decay
from pallas_kernels.mosaic_gpu import plgpu

CHUNK = gpu.ROWS
MARKED = 8  # one token in so many is a mark (gpu_decay.py)
KEYED = ("q", "k", "w", "second_k", "second_q")  # arrays with the key size; others have the value size
SCORES_BY_LEVEL = ("scores_in_blocks", "scores_in_halves", "scores")
TOTAL, READS, WRITES, KEEP = range(4)  # rows of gpu.weight_rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is built for. key_dim, value_dim: padded. tokens: names of the arrays (b, t, h, k | v) it reads.

    pieces: of time, of `piece` chunks each in the order of the walk, the last maybe of fewer. states_only: see the module.
    """

    b: int
    t: int
    heads: int
    key_dim: int
    value_dim: int
    decay: Decay
    reverse: bool
    strict: bool
    scale: float
    tokens: tuple[str, ...]
    segmented: bool
    enters: bool
    keeps_y: bool
    checkpoint_every: int | None
    out_dtype: jnp.dtype
    second_scale: float = 1.0
    pieces: int = 1
    states_only: bool = False

    @property
    def n(self) -> int:
        """Chunks."""
        return self.t // CHUNK

    @property
    def piece(self) -> int:
        """Chunks of a piece."""
        return -(-self.n // self.pieces)

    @property
    def transition(self) -> bool:
        """Whether blocks are added that find T."""
        return self.states_only and "w" in self.tokens

    @property
    def splits(self) -> int:
        """Blocks of columns."""
        return (self.value_dim + (self.key_dim if self.transition else 0)) // self.columns

    @property
    def columns(self) -> int:
        """Columns of the state that a block walks with: what registers hold."""
        return 32 if self.decay == "value" or self.key_dim > 128 else 64

    @property
    def warpgroups(self) -> int:
        """2 where two blocks of the state's columns share what is made of queries and keys, most of the work beside a decay by key channel;
        each then makes half of the channels, 64, a tile's width."""
        shares = self.decay == "key" and not self.states_only and "dot_with" not in self.tokens and self.out_dtype == jnp.bfloat16
        return 2 if shares and self.key_dim == 128 and self.value_dim % (2 * self.columns) == 0 else 1

    @property
    def swizzle(self) -> int:
        """Bytes of a tile's row, of every operand."""
        return 2 * self.columns

    @property
    def by_channel(self) -> bool:
        """Whether the decay has channels."""
        return self.decay in ("key", "value")

    @property
    def has_rows(self) -> bool:
        """Whether tokens have scalar weights (gpu.weight_rows)."""
        return self.decay == "head" or self.segmented

    @property
    def outputs(self) -> dict[str, str]:
        """What is read out: name, and where it is laid out before it is stored."""
        places = {"o": "scores"} if "q" in self.tokens else {}
        places |= {"second_o": "second_scores"} if "second_q" in self.tokens else {}
        return places if self.out_dtype == jnp.bfloat16 and self.columns == CHUNK else {name: f"{name}_out" for name in places}

    @property
    def rewrites(self) -> bool:
        """Whether what is written to the state is weighted in the place of v; a decay by channel has places of its own."""
        return self.has_rows and not self.by_channel

    @property
    def stepped(self) -> bool:
        """Whether operands that products of pairs have read are stepped on to the borders, whose last one is rounded (gpu_decay.rest)."""
        return self.by_channel and "q" in self.tokens

    @property
    def decayed_columns(self) -> int:
        """Channels of the decay that a block copies."""
        return self.key_dim if self.decay == "key" else self.columns

    def stages(self) -> dict[str, tuple[tuple[int, ...], Any, bool]]:
        """What is copied with each chunk: shape, dtype, and whether it is tiled."""
        copied: dict[str, tuple[tuple[int, ...], Any, bool]] = {}
        for name in self.tokens:
            copied[name] = ((CHUNK, self.key_dim if name in KEYED else self.columns), jnp.bfloat16, True)
        if self.has_rows:
            copied["rows"] = ((4, CHUNK), jnp.float32, False)
        if self.segmented:
            copied["segments"] = ((CHUNK,), jnp.int32, False)
        if self.by_channel:
            copied["total"] = ((CHUNK, self.decayed_columns), jnp.float32, True)
            copied["marks"] = ((CHUNK // MARKED, self.decayed_columns), jnp.float32, False)
        return copied

    def plain_space(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Of what a chunk's work is laid out in, what is not tiled."""
        if not self.by_channel:
            return {}
        columns = self.decayed_columns
        references = gpu_decay.reference_shape(columns)
        return {"references": (references, jnp.float32), "ratios": ((gpu_decay.MARKS, columns), jnp.bfloat16)}

    def space(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """What a chunk's work is laid out in, tiled."""
        laid: dict[str, tuple[tuple[int, ...], Any]] = {}
        if "q" in self.tokens or "w" in self.tokens:
            laid["state"] = ((self.key_dim, self.columns), jnp.bfloat16)
        if "q" in self.tokens:
            laid["scores"] = ((CHUNK, CHUNK), jnp.bfloat16)
            if "second_q" in self.tokens or "second_k" in self.tokens:
                laid["second_scores"] = ((CHUNK, CHUNK), jnp.bfloat16)
            laid |= {place: ((CHUNK, self.columns), self.out_dtype) for place in self.outputs.values() if place not in laid}
        if "w" in self.tokens:
            laid["y"] = ((CHUNK, self.columns), jnp.bfloat16)
        if self.decay == "value" and "q" in self.tokens:
            laid["scaled_v"] = ((CHUNK, self.columns), jnp.bfloat16)
            laid |= dict.fromkeys(SCORES_BY_LEVEL, ((CHUNK, CHUNK), jnp.bfloat16))
        return laid

    def buffer(self, shape: tuple[int, ...], dtype: Any, tile: bool = True) -> Any:
        """Shared memory of this kernel."""
        if not tile:
            return gpu.plain(shape, dtype)
        return gpu.tiled(shape, dtype, self.swizzle if jnp.dtype(dtype).itemsize == 2 else gpu.SWIZZLE_BYTES)

    def stage_count(self) -> int:
        """2 where shared memory holds them, else 1: then copies and computing alternate, but for what is copied early.

        Also 1 beside a decay by channel where a core then holds a second block, which computes while the first one waits.
        """
        if self.decay == "value" and self.key_dim > 192:
            return 1  # the addresses of two cost registers that this one lacks: 4 to 8 bytes were spilled
        if self.warpgroups == 1 and self.by_channel and self.bytes_taken(1) <= gpu.SHARED_MEMORY_BYTES // 2 - 2048 < self.bytes_taken(2):
            return 1
        if len(self.tokens) > 4 and 2 * self.bytes_taken(1) <= gpu.SHARED_MEMORY_BYTES - 4096 < 2 * self.bytes_taken(2):
            return 1  # two blocks a core, which hide each other's copies
        return 2 if self.bytes_taken(2) <= gpu.SHARED_MEMORY_BYTES - 2048 else 1

    def bytes_taken(self, stages: int) -> int:
        """Shared memory with so many stages."""
        laid = [((*self.own(name), *shape), dtype) for name, (shape, dtype) in self.space().items()]
        staged = [
            ((1 if self.early(name, stages) else stages, *self.own(name), *shape), dtype)
            for name, (shape, dtype, _) in self.stages().items()
        ]
        return gpu.shared_bytes([*laid, *self.plain_space().values(), *staged])

    def early(self, name: str, stages: int) -> bool:
        """Whether an array has one stage, others having `stages`, and is copied to it again as soon as it is read."""
        early = {"key": ("total",), "value": ("total", "v")}.get(self.decay, ())
        return name in early and self.stepped and "second_k" not in self.tokens and (stages == 1 or self.warpgroups == 2)

    def groups(self) -> list[tuple[tuple[str, ...], int]]:
        """What is copied with each chunk and to how many stages, in groups that are waited for apart: at its end, and early, as soon as the
        one stage is read."""
        stages = self.stage_count()
        early = tuple(name for name in self.stages() if self.early(name, stages))
        late = tuple(name for name in self.stages() if name not in early)
        return [(late, stages)] + ([(early, 1)] if early else [])

    def own(self, name: str) -> tuple[int, ...]:
        """The axis of warpgroups of what each has a place of its own for."""
        return (self.warpgroups,) if self.warpgroups > 1 and name in ("v", "second_v", "state", "scores", "y") else ()

    def results(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The kernel's outputs. dots: a part for each block of columns. states_only: (b, pieces - 1, h, k, v + k of T) alone."""
        b, t, h, keys, values = self.b, self.t, self.heads, self.key_dim, self.value_dim
        if self.states_only:
            return {"state": jax.ShapeDtypeStruct((b, self.pieces - 1, h, keys, self.splits * self.columns), jnp.float32)}
        made = {"state": jax.ShapeDtypeStruct((b, h, keys, values), jnp.float32)}
        made |= {name: jax.ShapeDtypeStruct((b, t, h, values), self.out_dtype) for name in self.outputs}
        if self.keeps_y:
            made["y"] = jax.ShapeDtypeStruct((b, t, h, values), jnp.bfloat16)
        dots = {"dots": "dot_with", "second_dots": "second_dot_with"}
        for name, other in dots.items():
            if other in self.tokens:
                made[name] = jax.ShapeDtypeStruct((values // self.columns, b, h, t), jnp.float32)
        if self.checkpoint_every is not None:
            made["checkpoints"] = jax.ShapeDtypeStruct((b, h, -(-self.n // self.checkpoint_every), keys, values), jnp.float32)
        return made


def launch(plan: Plan, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs the kernel: inputs as gpu.py prepares them, results as `Plan.results` names them."""
    groups, warpgroups = plan.groups(), plan.warpgroups
    stages = {name: count for names, count in groups for name in names}
    staged = {
        name: plan.buffer((stages[name], *plan.own(name), *shape), dtype, tile) for name, (shape, dtype, tile) in plan.stages().items()
    }
    space = {name: plan.buffer((1, *plan.own(name), *shape), dtype) for name, (shape, dtype) in plan.space().items()}
    space |= {name: plan.buffer((1, *shape), dtype, False) for name, (shape, dtype) in plan.plain_space().items()}
    copies = [sum(warpgroups if plan.own(name) else 1 for name in group) for group, _ in groups]
    barriers = [plgpu.Barrier(num_arrivals=many, num_barriers=count) for many, (_, count) in zip(copies, groups, strict=True)]
    meeting = [plgpu.Barrier(num_arrivals=warpgroups)] if warpgroups > 1 else []
    results = plan.results()
    names = (list(inputs), list(results), list(staged), list(space))

    def body(*refs: Any) -> None:
        rest = iter(refs)
        source, target, stage, laid = ({name: next(rest) for name in group} for group in names)
        _Block(plan, source, target, stage, laid, next(rest), list(rest)).walk()

    made = gpu.kernel(
        body,
        out_type=list(results.values()),
        scratch_types=[*staged.values(), *space.values(), gpu.plain((warpgroups,), jnp.int32), *barriers, *meeting],
        grid=(plan.splits // warpgroups, plan.heads, plan.b * (plan.pieces - plan.states_only)),
        grid_names=("columns", "head", "batch"),
        name="linear_recurrence_" + ("delta_walk" if "w" in plan.tokens else "walk") + ("_states" if plan.states_only else ""),
        threads=warpgroups if warpgroups > 1 else None,
    )(*inputs.values())
    return dict(zip(results, made, strict=True))


class _Block:
    """One thread block, as one of its warpgroups sees it."""

    def __init__(
        self,
        plan: Plan,
        source: dict[str, Any],
        target: dict[str, Any],
        stage: dict[str, Any],
        space: dict[str, Any],
        nought: Any,
        barriers: list[Any],
    ) -> None:
        self.plan, self.source, self.target = plan, source, target
        self.stage, self.laid = stage, space
        self.groups = [(*group, barrier) for group, barrier in zip(plan.groups(), barriers, strict=False)]
        self.meeting = barriers[-1]
        self.split, self.head, self.batch = (jax.lax.axis_index(name) for name in ("columns", "head", "batch"))
        self.shares = plan.warpgroups > 1
        self.warpgroup = jax.lax.axis_index("warpgroup") if self.shares else 0
        self.nought = nought.at[self.warpgroup]
        self.columns = self.columns_of(self.warpgroup)
        self.first: Any = 0  # step of the whole walk with which this piece begins
        self.count: Any = plan.piece
        if plan.transition:
            blocks = plan.value_dim // plan.columns
            self.columns = pl.ds(jnp.minimum(self.split, blocks - 1) * plan.columns, plan.columns)
            self.writes = jnp.where(self.split < blocks, 1.0, 0.0)  # what v and second_v are multiplied by
        if plan.pieces > 1:
            run = jnp.int32(plan.pieces - plan.states_only)
            self.piece, self.batch = jax.lax.rem(self.batch, run), jax.lax.div(self.batch, run)
            self.first = self.piece * plan.piece
            if not plan.states_only and plan.n % plan.piece:
                self.count = jnp.minimum(plan.n - self.first, plan.piece)

    def columns_of(self, warpgroup: Any) -> Any:
        """A warpgroup's columns of the state."""
        return pl.ds((self.split * self.plan.warpgroups + warpgroup) * self.plan.columns, self.plan.columns)

    def part(self) -> Any:
        """The channels that this warpgroup makes operands of; None for all."""
        return pl.ds(self.warpgroup * gpu_decay.SLICE, gpu_decay.SLICE) if self.shares else None

    def meet(self) -> None:
        """Waits until all warpgroups are here."""
        if self.shares:
            plgpu.barrier_arrive(self.meeting)
            plgpu.barrier_wait(self.meeting)

    def alone(self, action: Callable[[], None]) -> None:
        """Has the first warpgroup do it."""
        if self.shares:
            pl.when(self.warpgroup == 0)(action)
        else:
            action()

    def walk(self) -> None:
        """All chunks of the piece."""
        plan = self.plan
        self.nought[...] = jnp.int32(0)
        self.alone(self.start)
        if plan.transition:
            row, column = gpu.row_and_column((plan.key_dim, plan.columns))
            first = self.split * plan.columns - plan.value_dim  # negative for values, which start from 0
            state = jnp.where((row == column + first) & (column + first >= 0), 1.0, 0.0)
        elif plan.enters:
            place = (self.batch, self.head) if plan.pieces == 1 else (self.batch, self.piece, self.head)
            state = gpu.load(self.source["initial"].at[(*place, slice(None), self.columns)], optimized=False)
        else:
            state = gpu.filled((plan.key_dim, plan.columns), 0.0)
        state = jax.lax.fori_loop(0, self.count, self.step, state)
        # Through `nought`, so that the address is not taken for the initial state's and kept in registers all the way.
        head = self.head + self.nought[...]
        if plan.states_only:
            columns = pl.ds(self.split * plan.columns, plan.columns)
            self.target["state"].at[self.batch, self.piece, head, :, columns][...] = state
        else:

            @pl.when(self.first + self.count == plan.n)
            def _() -> None:
                self.target["state"].at[self.batch, head, :, self.columns][...] = state

        plgpu.wait_smem_to_gmem(0)

    def start(self) -> None:
        """What is there before the first chunk."""
        if self.plan.by_channel:
            start = self.laid["references"].at[0, 0]
            start[...] = gpu.per_column(jnp.zeros(start.shape, jnp.float32))
        for group in range(len(self.groups)):
            for step in range(min(self.groups[group][1], self.plan.piece)):
                pl.when(step < self.count)(functools.partial(self.fetch, jnp.int32(step), step, group))

    def at(self, step: jax.Array) -> jax.Array:
        """The chunk that is walked over in a step of the piece."""
        step = self.first + step
        return self.plan.n - 1 - step if self.plan.reverse else step

    def fetch(self, step: jax.Array, slot: Any, group: int) -> None:
        """Starts the copies of a group of a step's chunk."""
        names, _, barrier = self.groups[group]
        for name in names:
            for part in range(self.plan.warpgroups if self.plan.own(name) else 1):
                place = self.stage[name].at[(slot, part) if self.plan.own(name) else slot]
                columns = self.columns_of(part) if self.shares else self.columns
                plgpu.copy_gmem_to_smem(self.chunk_of(name, self.at(step), columns), place, barrier.at[slot])

    def refetch(self, step: jax.Array, slot: Any, group: int) -> None:
        """Starts the copies of a group that take the place of a step's, which all warpgroups have read."""
        if group >= len(self.groups):
            return
        stages = self.groups[group][1]

        @pl.when((step + stages < self.count) & (self.warpgroup == 0))
        def _() -> None:
            self.fetch(step + stages, slot, group)

    def chunk_of(self, name: str, at: jax.Array, of_values: Any) -> Any:
        """Where a chunk of an input lies. of_values: the columns, where they are the values' own."""
        ref, tokens = self.source[name], pl.ds(at * CHUNK, CHUNK)
        if name == "segments":
            return ref.at[self.batch, tokens]
        if name == "rows":
            return ref.at[self.batch, self.head if ref.shape[1] > 1 else 0, at]
        keyed = name in KEYED or (self.plan.decay == "key" and name in ("total", "marks"))
        columns = slice(None) if keyed else of_values
        if name == "marks":
            return ref.at[self.batch, pl.ds(at * (CHUNK // MARKED), CHUNK // MARKED), MARKED - 1, self.head, columns]
        return ref.at[self.batch, tokens, jax.lax.div(self.head, jnp.int32(self.plan.heads // ref.shape[2])), columns]

    def chunk_to(self, name: str, at: jax.Array) -> Any:
        """Where a chunk of an output lies."""
        return self.target[name].at[self.batch, pl.ds(at * CHUNK, CHUNK), self.head, self.columns]

    def step(self, step: jax.Array, state: jax.Array) -> jax.Array:
        """One chunk: from the state that enters it to the state that leaves it."""
        nought = self.nought[...]
        plan, at = self.plan, self.at(step)
        slots = [nought if stages == 1 else jax.lax.rem(step, jnp.int32(stages)) for _, stages, _ in self.groups]
        slot_of = {name: slot for (names, _, _), slot in zip(self.groups, slots, strict=True) for name in names}

        def own(name: str, ref: Any, slot: Any) -> Any:
            return ref.at[(slot, self.warpgroup) if plan.own(name) else slot]

        self.space = space = {name: own(name, ref, nought) for name, ref in self.laid.items()}
        here = {name: own(name, ref, slot_of[name]) for name, ref in self.stage.items()}
        if plan.checkpoint_every is not None:
            self.checkpoint(at, state)
        if "state" in space and (not self.reads_rest or "w" in plan.tokens):
            space["state"][...] = state.astype(jnp.bfloat16)
        for (_, _, barrier), slot in zip(self.groups, slots, strict=True):
            plgpu.barrier_wait(barrier.at[slot])
        if plan.by_channel:
            self.alone(lambda: gpu_decay.lay_references(space["references"], space["ratios"], here["marks"]))
            self.meet()
        plgpu.commit_smem()
        y = here["v"]
        if "w" in plan.tokens:
            y = space["y"]
            value = gpu.load(here["v"]).astype(jnp.float32)
            if plan.transition:
                value = value * self.writes
                if "second_v" in plan.tokens:
                    here["second_v"][...] = (gpu.load(here["second_v"]).astype(jnp.float32) * self.writes).astype(jnp.bfloat16)
            erased = value - gpu.mm(here["w"], space["state"])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's y and o
            y[...] = erased.astype(jnp.bfloat16)
            plgpu.commit_smem()
            if plan.keeps_y:
                plgpu.copy_smem_to_gmem(y, self.chunk_to("y", at))
        if "q" in plan.tokens:
            if "w" not in plan.tokens:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if self.reads_rest:
                space["state"][...] = (state * self.rest(here)).astype(jnp.bfloat16)
            self.lay_out("o", self.read(here, y, lambda: self.refetch(step, slots[-1], 1)), plan.scale, here, at)
        if "second_q" in plan.tokens:
            self.lay_out("second_o", self.read_pairs(here, "second_q", y, space["second_scores"], True), plan.second_scale, here, at)
        products, keep = self.prepare_writes(here, y), self.keep(here)
        rest = self.rest(here) if plan.stepped and not plan.reverse else None
        plgpu.commit_smem()
        self.meet()
        for name, place in plan.outputs.items():
            plgpu.copy_smem_to_gmem(space[place], self.chunk_to(name, at))
        (left, right), *more = products
        state = state if keep is None else state * keep
        if more and plan.second_scale != 1.0:
            # In fp32, by way of the state: an operand times the scale would be rounded once more.
            state = gpu.mm(*more[0], state * (1.0 / plan.second_scale)) * plan.second_scale
            more = []
        state = gpu.mm(left, right, state, *more)
        if rest is not None:
            state = state * rest

        self.meet()
        self.refetch(step, slots[0], 0)
        return state

    def lay_out(self, name: str, out: jax.Array, scale: float, here: dict[str, Any], at: jax.Array) -> None:
        """Lays out what was read, times scale, to be stored, and stores its dots."""
        out = out if scale == 1.0 else out * scale
        second = "second_" if name == "second_o" else ""
        if f"{second}dot_with" in self.plan.tokens:
            dots = jnp.sum(out * gpu.load(here[f"{second}dot_with"]).astype(jnp.float32), axis=1)
            self.target[f"{second}dots"].at[self.split, self.batch, self.head, pl.ds(at * CHUNK, CHUNK)][...] = dots
        self.space[self.plan.outputs[name]][...] = out.astype(self.plan.out_dtype)

    def checkpoint(self, at: jax.Array, state: jax.Array) -> None:
        """Stores the state where a group of chunks is entered."""
        every = jnp.int32(self.plan.checkpoint_every)
        within = jax.lax.rem(at, every)
        enters = (at == self.plan.n - 1) | (within == every - 1) if self.plan.reverse else within == 0

        @pl.when(enters)
        def _() -> None:
            self.target["checkpoints"].at[self.batch, self.head, jax.lax.div(at, every), :, self.columns][...] = state

    def keep(self, here: dict[str, Any]) -> jax.Array | None:
        """What the entering state is multiplied by; None for 1."""
        kept = here["rows"][KEEP, 0] if self.plan.has_rows else None
        if not self.plan.by_channel:
            return kept
        rounded = self.plan.stepped and not self.plan.reverse
        decay = gpu_decay.keep(here["marks"], self.space["references"], *self.state_by_channel(), rounded)
        return decay if kept is None else decay * kept

    def rest(self, here: dict[str, Any]) -> jax.Array:
        """What rounding leaves out of weights to the chunk's last token, for each entry of the state."""
        return gpu_decay.rest(here["marks"], self.space["references"], *self.state_by_channel())

    def state_by_channel(self) -> tuple[tuple[int, int], bool]:
        """The state's shape, and whether its rows are the decay's channels; else its columns are."""
        return (self.plan.key_dim, self.plan.columns), self.plan.decay == "key"

    @property
    def reads_rest(self) -> bool:
        """Whether queries read the state through `rest`, their weights being to the chunk's last token."""
        return self.plan.stepped and self.plan.reverse and self.plan.decay == "key"

    def read(self, here: dict[str, Any], y: Any, early: Callable[[], None]) -> jax.Array:
        """(c, columns): reads . q S + P y. early: called when the early group has been read."""
        plan, space, scores = self.plan, self.space, self.space["scores"]
        if plan.decay == "key":
            q, k, ratios, reads = here["q"], here["k"], space["ratios"], self.per_token(here, READS)
            part = self.part()
            given = (here["total"], space["references"], ratios, plan.reverse)
            gpu_decay.scores_by_key(scores, q, k, q, k, *given, early, part, self.meet)
            scores[...] = jnp.where(self.seen(here, plan.strict), gpu.load(scores), jnp.bfloat16(0))
            self.meet()
            gpu_decay.step(q, ratios, gpu_decay.BORDER, not plan.reverse, reads, part)
            plgpu.commit_smem()
            self.meet()
            return gpu.mm(q, space["state"], None, (scores, y))

        if plan.decay != "value":
            return self.read_pairs(here, "q", y, scores, plan.strict)
        levels = [space[name] for name in SCORES_BY_LEVEL]

        def lay(products: jax.Array) -> None:
            gpu_decay.lay_by_level(levels, self.weigh(here, products, plan.strict))

        if plan.key_dim > 128:  # no registers for both products at once
            lay(gpu.mm(here["q"], gpu.transposed(here["k"])))
            old = gpu.mm(here["q"], space["state"])
        else:
            _, old = gpu.mm_while((here["q"], gpu.transposed(here["k"])), (here["q"], space["state"]), lay)
        given = (here["total"], here["marks"], space["references"], space["ratios"])
        return gpu_decay.read_by_value(
            lambda factors: self.times(old * factors, here, READS), levels, space["scaled_v"], y, *given, plan.reverse, early
        )

    def read_pairs(self, here: dict[str, Any], query: str, y: Any, scores: Any, strict: bool) -> jax.Array:
        """`read` without a decay by channel, of these queries, with what the second pair of a plain walk adds."""
        q, state = here[query], self.space["state"]

        def lay(products: jax.Array) -> None:
            scores[...] = self.weigh(here, products, strict).astype(jnp.bfloat16)

        _, old = gpu.mm_while((q, gpu.transposed(here["k"])), (q, state), lay)
        old = self.times(old, here, READS)
        if "second_k" in self.plan.tokens and "w" not in self.plan.tokens:  # the delta rule reads y alone
            second = self.space["second_scores"]
            second[...] = self.weigh(here, gpu.mm(q, gpu.transposed(here["second_k"])), False).astype(jnp.bfloat16)
            plgpu.commit_smem()
            # Scaled after it is rounded, as the same products are where they belong to queries: a decay's gradient is their difference.
            return gpu.mm(scores, y, old + gpu.mm(second, here["second_v"]) * self.plan.second_scale)
        plgpu.commit_smem()
        return gpu.mm(scores, y, old)

    def prepare_writes(self, here: dict[str, Any], y: Any) -> list[tuple[Any, Any]]:
        """Lays out what is written to the state, as pairs of factors to multiply once committed."""
        plan = self.plan
        writes = self.per_token(here, WRITES)
        if plan.decay == "value" and "q" not in plan.tokens:
            gpu_decay.scale_to_border(y, here["total"], here["marks"], self.space["references"], plan.reverse, False, writes)
            return [(gpu.transposed(here["k"]), y)]
        if plan.decay == "value":
            gpu_decay.step(self.space["scaled_v"], self.space["ratios"], gpu_decay.BORDER, plan.reverse, writes)
            return [(gpu.transposed(here["k"]), self.space["scaled_v"])]
        written = [("k", y, "v")] + ([("second_k", here["second_v"], "second_v")] if "second_k" in plan.tokens else [])
        pairs = []
        part = self.part()
        for key, value, place in written:
            if plan.decay == "key":
                if plan.stepped and key == "k":
                    gpu_decay.step(here[key], self.space["ratios"], gpu_decay.BORDER, plan.reverse, writes, part)
                else:
                    given = (here["total"], here["marks"], self.space["references"])
                    gpu_decay.scale_to_border(here[key], *given, plan.reverse, plan.stepped, writes, part)
                pairs.append((gpu.transposed(here[key]), value))
            elif plan.rewrites:
                weighted = self.times(gpu.load(value).astype(jnp.float32), here, WRITES)
                here[place][...] = weighted.astype(jnp.bfloat16)
                pairs.append((gpu.transposed(here[key]), here[place]))
            else:
                pairs.append((gpu.transposed(here[key]), value))
        return pairs

    def per_token(self, here: dict[str, Any], row: int) -> Any:
        """Where a scalar a token lies; None where all are 1."""
        return here["rows"].at[row] if self.plan.has_rows else None

    def times(self, x: jax.Array, here: dict[str, Any], row: int) -> jax.Array:
        """x with its rows multiplied by a scalar a token."""
        weights = self.per_token(here, row)
        return x if weights is None else x * gpu.along_columns(gpu.load_per_row(weights), x.shape[1])

    def seen(self, here: dict[str, Any], strict: bool) -> jax.Array:
        """(c, c) bool: which pairs of a chunk count."""
        row, column = gpu.row_and_column((CHUNK, CHUNK))
        if self.plan.reverse:
            seen = column > row if strict else column >= row
        else:
            seen = column < row if strict else column <= row
        if self.plan.segmented:
            mine = gpu.along_columns(gpu.load_per_row(here["segments"]), CHUNK)
            theirs = gpu.along_rows(gpu.load_per_column(here["segments"]), CHUNK)
            seen = seen & (mine == theirs)
        return seen

    def weigh(self, here: dict[str, Any], products: jax.Array, strict: bool) -> jax.Array:
        """q k^T, masked, and weighted by a decay a head."""
        seen = self.seen(here, strict)
        if self.plan.decay != "head":
            return jnp.where(seen, products, 0.0)
        total = here["rows"].at[TOTAL]
        difference = gpu.along_columns(gpu.load_per_row(total), CHUNK) - gpu.along_rows(gpu.load_per_column(total), CHUNK)
        return products * jnp.exp(jnp.where(seen, -difference if self.plan.reverse else difference, -jnp.inf))
