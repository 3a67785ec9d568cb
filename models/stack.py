"""Depth: blocks of pre-norm residual branches, and stages of repeated patterns of them. Initialisation under vmap, scan
and rematerialisation are handled here only.

A stage's pattern (its period) is built once under `vmap` over its repeats, so every parameter of the period has a
leading axis of that size, whether the stack then scans or unrolls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from recollect.configuration import Config, UserError, requires
from recollect.layers.context import Context, Source
from recollect.layers.mixer import MixerConfig, MixerOutput, Place, State, constrain_activations
from recollect.layers.modules.dropout import layer_keys
from recollect.layers.token_sums import LayerSums, Means, TokenSums, number_of_tokens
from recollect.models.rematerialisation import rematerialised
from recollect.models.streams import StackStreams


@chz.chz(typecheck=True)
class Stage(Config):
    """`repeats` copies of a pattern of mixers, one after another."""

    pattern: tuple[MixerConfig, ...]
    repeats: int = chz.field(default=1, validator=requires(lambda value: value >= 1, "a stage is there at least once"))

    @chz.validate
    def _not_empty(self) -> None:
        if not self.pattern:
            raise UserError("pattern=(): a stage needs at least one mixer in its pattern")

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


class Block(nnx.Module):
    """x = x + mixer(norm(x));  x = x + mlp(norm(x))."""

    def __init__(self, mixer: MixerConfig, config: Any, place: Place, rngs: nnx.Rngs):
        norm, mlp, width = config.norm, config.mlp, config.width
        self.mixer_norm = norm.build(width)
        self.mixer = mixer.build(width, place, rngs)
        self.mlp_norm = None if mlp is None else norm.build(width)
        self.mlp = None if mlp is None else mlp.build(width, place, rngs)

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> MixerOutput:
        """Returns the stream after the layer, and the mixer's losses and metrics."""
        return self._rest(x, self.mixer(self.mixer_norm(x), context))

    def init_state(self, batch_size: int, max_length: int, dtype: Any, source: Source | None = None) -> State:
        """Returns the mixer's state before any token, of a cross mixer what it keeps of the source."""
        if source is not None and self.mixer.config.traits.cross:
            return self.mixer.init_cross_state(source, dtype)
        return self.mixer.init_state(batch_size, max_length, dtype)

    def extend(self, x: Float[Array, "b t d"], state: State, context: Context) -> tuple[MixerOutput, State]:
        """Returns the stream after the layer at the next tokens, and the mixer's state after them."""
        out, state = self.mixer.extend(self.mixer_norm(x), state, context)
        return self._rest(x, out), state

    def _rest(self, x: Float[Array, "b t d"], out: MixerOutput) -> MixerOutput:
        x = x + out.hidden
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return dataclasses.replace(out, hidden=x)


class Stack(StackStreams):
    """All layers of a `LanguageModel` config, a list of stages; each parameter has a leading axis over its stage's
    repeats."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.repeats = tuple(stage.repeats for stage in config.stages)
        self.remat, self.unroll, depths = config.remat, config.unroll, [stage.depth for stage in config.stages]
        self.stages = nnx.List(
            _build_period(stage, config, sum(depths[:index]), sum(depths), rngs)
            for index, stage in enumerate(config.stages)
        )

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> MixerOutput:
        """Returns the stream after all layers; losses and metrics averaged over the layers that have them."""
        layers: list[TokenSums] = []
        first = 0
        for period, repeats in zip(self.stages, self.repeats, strict=True):
            keys = None if context.key is None else layer_keys(context.key, first, repeats, len(period))
            run, first = self._period(context), first + repeats * len(period)
            if repeats == 1 or self.unroll:
                for index in range(repeats):
                    x, sums = run(x, take((period, keys), index))
                    layers += jax.tree.map(lambda leaf: leaf[None], sums)
            else:
                x, sums = jax.lax.scan(run, x, (period, keys))
                layers += sums
        total = LayerSums(tuple(layers)) if layers else None
        return MixerOutput(x) if total is None else MixerOutput(x, *total.formed(), total)

    def init_state(
        self, batch_size: int, max_length: int, dtype: Any, source: Source | None = None
    ) -> tuple[State, ...]:
        """Returns one state per layer."""
        layers = tuple(self.layers())
        policies = [block.mixer for block in layers if hasattr(block.mixer, "policy_layer")]
        for index, mixer in enumerate(policies):
            mixer.policy_layer = (index, len(policies))
        return tuple(block.init_state(batch_size, max_length, dtype, source) for block in layers)

    def layers(self) -> Iterator[Block]:
        """Yields the layers, first to last, each with its own parameters."""
        for period, repeats in zip(self.stages, self.repeats, strict=True):
            for index in range(repeats):
                yield from take(period, index)

    def _period(self, context: Context) -> Any:
        """Returns the function that runs the layers of one period, rematerialised for the backward pass by `remat`."""

        def run(x: jax.Array, part: tuple[nnx.List, Any]) -> tuple[jax.Array, list[TokenSums]]:
            layers: list[TokenSums] = []
            period, keys = part
            for index, block in enumerate(period):
                key = None if keys is None else keys[index]
                out = block(constrain_activations(x), dataclasses.replace(context, key=key))
                x = out.hidden
                if out.losses or out.metrics:
                    means = Means.of(out.losses, out.metrics, number_of_tokens(x, context.segments))
                    layers.append(means if out.sums is None else out.sums)
            return x, layers

        return run if self.remat == "none" else rematerialised(run, self.remat)


def take(period: Any, index: int) -> Any:
    """Returns one repeat of a stacked period."""
    return jax.tree.map(lambda leaf: leaf[index], period)


def _build_period(stage: Stage, config: Any, first: int, depth: int, rngs: nnx.Rngs) -> nnx.List:
    block = Block
    if config.canon is not None or config.residual != "stream":
        from recollect.models.other_blocks import other_block as block  # type: ignore[assignment]

    def build(key: Key[Array, ""], start: Int[Array, ""]) -> nnx.List:
        layer_rngs = nnx.Rngs(params=key)
        return nnx.List(
            block(mixer, config, Place(start + offset, depth), layer_rngs) for offset, mixer in enumerate(stage.pattern)
        )

    keys = jax.random.split(rngs.params(), stage.repeats)
    return jax.vmap(build)(keys, first + len(stage.pattern) * jnp.arange(stage.repeats))
