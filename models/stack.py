"""Depth: stages of repeated patterns. Initialisation under vmap, scan and rematerialisation are handled here only.

A stage's pattern (its period) is built once under `vmap` over its repeats, so every parameter of the period has a
leading axis of that size, whether the stack then scans or unrolls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from recollect.configuration import Config, UserError, requires
from recollect.layers.mixer import Context, MixerConfig, MixerOutput, Place, State, constrain_activations
from recollect.layers.modules.mlp import MlpConfig
from recollect.layers.modules.norms import NormConfig
from recollect.models.block import Block

Remat = Literal["none", "dots", "full"]


@chz.chz(typecheck=True)
class Stage(Config):
    """`repeats` copies of a pattern of mixers, one after another."""

    pattern: tuple[MixerConfig, ...]
    repeats: int = chz.field(default=1, validator=requires(lambda value: value >= 1, "a stage is there at least once"))

    @chz.validate
    def _not_empty(self) -> None:
        if not self.pattern:
            raise UserError("a stage needs at least one mixer in its pattern")

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.pattern) * self.repeats


def repeat(*mixers: MixerConfig, depth: int) -> tuple[Stage, ...]:
    """Returns stages for `depth` layers that cycle through `mixers`; a remainder becomes another stage."""
    if not mixers or depth < 1:
        raise UserError(f"depth={depth} with {len(mixers)} mixers: both must be at least 1")
    whole, rest = divmod(depth, len(mixers))
    stages = (Stage(pattern=mixers, repeats=whole),) if whole else ()
    return (*stages, Stage(pattern=mixers[:rest])) if rest else stages


class Stack(nnx.Module):
    """All layers, a list of stages; each parameter has a leading axis over its stage's repeats."""

    def __init__(
        self,
        stages: tuple[Stage, ...],
        norm: NormConfig,
        mlp: MlpConfig | None,
        width: int,
        rngs: nnx.Rngs,
        *,
        remat: Remat = "none",
        unroll: bool = False,
    ):
        self.repeats = tuple(stage.repeats for stage in stages)
        self.remat = remat
        self.unroll = unroll
        depth = sum(stage.depth for stage in stages)
        first = 0
        periods = []
        for stage in stages:
            periods.append(_build_period(stage, norm, mlp, width, first, depth, rngs))
            first += stage.depth
        self.stages = nnx.List(periods)

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> MixerOutput:
        """Returns the stream after all layers; losses and metrics averaged over the layers that have them."""
        totals: list[dict[str, Any]] = []
        for period, repeats in zip(self.stages, self.repeats, strict=True):
            run = self._checkpointed(context)
            if repeats == 1 or self.unroll:
                for index in range(repeats):
                    x, sums = run(x, take(period, index))
                    totals.append(sums)
            else:
                x, sums = jax.lax.scan(run, x, period)
                totals.append(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums))
        losses, metrics = _averages(totals)
        return MixerOutput(x, losses, metrics)

    def branches(self, x: Float[Array, "b t d"], context: Context) -> Iterator[tuple[int, str, Float[Array, "b t d"]]]:
        """Yields (layer index, "mixer" or "mlp" or "sum", its value), unrolled; see `Block.branches`."""
        for index, block in enumerate(self._layers()):
            parts = block.branches(x, context)
            yield from ((index, part, value) for part, value in parts.items())
            x = parts["sum"]

    def init_state(self, batch_size: int, max_length: int, dtype: Any) -> tuple[State, ...]:
        """Returns one state per layer."""
        return tuple(block.mixer.init_state(batch_size, max_length, dtype) for block in self._layers())

    def extend(
        self, x: Float[Array, "b t d"], states: tuple[State, ...], context: Context
    ) -> tuple[Float[Array, "b t d"], tuple[State, ...]]:
        """Returns the stream after all layers at the next tokens, and the states after them. Unrolled: a scan that
        carries caches in and out copies them at every token."""
        after = []
        for block, state in zip(self._layers(), states, strict=True):
            out, state = block.extend(x, state, context)
            x = out.hidden
            after.append(state)
        return x, tuple(after)

    def _layers(self) -> Iterator[Block]:
        for period, repeats in zip(self.stages, self.repeats, strict=True):
            for index in range(repeats):
                yield from take(period, index)

    def _checkpointed(self, context: Context):
        def run(x, period):
            sums: list[dict[str, Any]] = []
            for block in period:
                out = block(constrain_activations(x), context)
                x = out.hidden
                sums.append(
                    {
                        kind: {name: (value, jnp.ones(())) for name, value in values.items()}
                        for kind, values in (("losses", out.losses), ("metrics", out.metrics))
                    }
                )
            return x, _add(sums)

        if self.remat == "none":
            return run
        policy = _keeps_products_and_kernels if self.remat == "dots" else None
        return jax.checkpoint(run, policy=policy)


def _keeps_products_and_kernels(primitive: Any, *args: Any, **params: Any) -> bool:
    """Returns what the policy "dots" keeps: results of matrix products with parameters, and of kernels, Pallas' and
    cuDNN's. A kernel's results are as small as its inputs, and recomputing them costs as much as the first time."""
    kernel = primitive.name == "pallas_call" or primitive.name.startswith("dot_product_attention_fwd")
    return kernel or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


def take(period: Any, index: int) -> Any:
    """Returns one repeat of a stacked period."""
    return jax.tree.map(lambda leaf: leaf[index], period)


def _build_period(
    stage: Stage, norm: NormConfig, mlp: MlpConfig | None, width: int, first: int, depth: int, rngs: nnx.Rngs
):
    def build(key: Key[Array, ""], start: Int[Array, ""]) -> nnx.List:
        layer_rngs = nnx.Rngs(params=key)
        places = (Place(start + offset, depth) for offset in range(len(stage.pattern)))
        return nnx.List(
            Block(mixer, norm, mlp, width, place, layer_rngs)
            for mixer, place in zip(stage.pattern, places, strict=True)
        )

    keys = jax.random.split(rngs.params(), stage.repeats)
    starts = first + len(stage.pattern) * jnp.arange(stage.repeats)
    return jax.vmap(build)(keys, starts)


def _add(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the sums of (value, count) pairs by name."""
    total: dict[str, Any] = {"losses": {}, "metrics": {}}
    for part in parts:
        for kind, values in part.items():
            for name, (value, count) in values.items():
                old = total[kind].get(name, (0.0, 0.0))
                total[kind][name] = (old[0] + value, old[1] + count)
    return total


def _averages(parts: list[dict[str, Any]]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    total = _add(parts)
    losses, metrics = (
        {name: value / count for name, (value, count) in total[kind].items()} for kind in ("losses", "metrics")
    )
    return losses, metrics
