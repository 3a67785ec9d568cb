"""Kernels under a mesh. XLA cannot partition them ("Mosaic kernels cannot be automatically partitioned"), so each
device runs its own part.

An operation declares the dimensions of its arrays by letters and wraps the function that calls kernels:

    forward = over_mesh(tpu.forward, {"q": "b t h k", "v": "b t h v", "log_decay": ("h", "b t h", "b t h k")}, ("b t h
    v", "b h k v"))

`forward` then is a shard_map wherever the ambient mesh (jax.set_mesh, jax.sharding.use_abstract_mesh) has axes larger
than 1: sequences (b) split over data and fsdp, heads (h) over tensor. The other dimensions stay whole, so every device
works on all tokens of its sequences. Elsewhere it is the function itself. Gradients pass through; the function's own
custom_vjp is used on each device.

Tokens (t) are split too, over the axis sequence, by operations that know what one part of a sequence has to learn of
the parts before it. Such an operation asks `dispatch.sequence_parts` first, and hands `over_sequence` what a
device does with its tokens, collectives (sequence_collectives.py) included:

    if sequence_parts(q.shape[1]) > 1:
        return over_sequence(part, {"q": "b t h k", "v": "b t h v"}, "b t h v")(q, v)

Inside, no axis is left to split by, so that `part` may call the operation itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from recollect.pallas_kernels.dispatch import SEQUENCE, free_axes

Dimensions = str | Sequence[str]
"""Letters of an array's dimensions, blanks between; several where its rank may differ."""

SPLIT: Mapping[str, tuple[str, ...]] = {"b": ("data", "fsdp"), "h": ("tensor",)}
"""Letter -> mesh axes, the first outermost."""

SPLIT_TOKENS: Mapping[str, tuple[str, ...]] = {**SPLIT, "t": (SEQUENCE,)}
"""The same with tokens split."""


def over_mesh(
    function: Callable[..., Any],
    arguments: Mapping[str, Dimensions | Mapping[str, Dimensions]],
    results: Any,
    *,
    split: Mapping[str, tuple[str, ...]] = SPLIT,
    exchanges: bool = False,
) -> Callable[..., Any]:
    """Returns `function` as each device of the ambient mesh runs it on its part.

    Args:
      function: takes and returns arrays. On a part it must compute that part of the whole: each split letter is a batch
        dimension.
      arguments: parameter's name -> letters. An array may be None, or a tree of arrays of the same letters, or a
        dataclass of arrays whose letters are given by field; parameters not named here hold no arrays that are traced.
        Arrays may have different sizes under one letter (grouped heads): part i of one meets part i of the others. Size
        1 serves all parts.
      results: letters of the result (Dimensions), or a tuple of them for a tuple of results, of which any may be None.
      split: letter -> mesh axes. An axis that does not divide a letter's sizes is not used: its devices repeat the
        work.
      exchanges: whether `function` exchanges data over axes, and so cannot be traced outside of them. Its results then
        are as `results` says, none of them None or of several ranks, and each letter that is split among arguments is
        split there.

    Raises:
      ValueError: `function` has no parameter of a name in `arguments`; when called, that an array's rank is none of
        those declared.
    """
    signature = inspect.signature(function)
    unknown = arguments.keys() - signature.parameters.keys()
    if unknown:
        raise ValueError(f"{getattr(function, '__name__', function)} has no parameters {', '.join(sorted(unknown))}")

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        free = free_axes()
        if all(size == 1 for size in free.values()):
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs).arguments
        arrays = {name: bound[name] for name in arguments if bound.get(name) is not None}
        letters = {name: _tree_letters(name, arguments[name], tree) for name, tree in arrays.items()}
        axes = _axes(_sizes(arrays, letters), split, free)

        def part(arrays: dict[str, Any]) -> Any:
            call = signature.bind(*args, **kwargs)
            call.arguments.update(arrays)
            return function(*call.args, **call.kwargs)

        def spec(letters: Sequence[str], shape: tuple[int, ...]) -> PartitionSpec:
            return PartitionSpec(
                *(axes.get(letter) if size > 1 else None for letter, size in zip(letters, shape, strict=True))
            )

        specs = jax.tree.map(lambda array, letters: spec(letters, array.shape), arrays, letters)
        out: Any
        if exchanges:
            out = jax.tree.map(lambda declared: PartitionSpec(*map(axes.get, declared.split())), results)
        else:
            shapes = jax.eval_shape(part, arrays)
            several = isinstance(shapes, tuple)
            made = [
                None if shape is None else spec(_letters(f"result {index}", declared, len(shape.shape)), shape.shape)
                for index, (declared, shape) in enumerate(
                    zip(results if several else (results,), shapes if several else (shapes,), strict=True)
                )
            ]
            out = tuple(made) if several else made[0]
        # check_vma: kernels do not say over which axes their results vary.
        return jax.shard_map(part, in_specs=(specs,), out_specs=out, axis_names=set(free), check_vma=False)(arrays)

    return wrapped


def over_sequence(
    function: Callable[..., Any], arguments: Mapping[str, Dimensions | Mapping[str, Dimensions]], results: Any
) -> Callable[..., Any]:
    """Returns `function` as each device of the ambient mesh runs it on its sequences, heads and tokens (t); it
    exchanges what tokens need of earlier parts.

    Arguments as those of `over_mesh` with `exchanges`. To be called where `sequence_parts` is more than 1.
    """
    return over_mesh(function, arguments, results, split=SPLIT_TOKENS, exchanges=True)


def constrained(x: jax.Array, dimensions: str) -> jax.Array:
    """Returns x, constrained to a layout over the ambient mesh by its letters ("b t d": sequences over data and fsdp,
    tokens over sequence, the rest whole on each device); itself without a mesh. An axis that does not divide a
    dimension is left out."""
    free = free_axes()
    if all(size == 1 for size in free.values()):
        return x
    letters = _letters("x", dimensions, x.ndim)
    axes = _axes({letter: {size} for letter, size in zip(letters, x.shape, strict=True)}, SPLIT_TOKENS, free)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(axes.get, letters)))


def _sizes(arrays: Mapping[str, Any], letters: Mapping[str, Any]) -> dict[str, set[int]]:
    """Letter -> the sizes of its dimensions, without 1."""
    sizes: dict[str, set[int]] = {}

    def add(array: Any, names: Sequence[str]) -> None:
        for letter, size in zip(names, array.shape, strict=True):
            if size > 1:
                sizes.setdefault(letter, set()).add(size)

    jax.tree.map(add, arrays, letters)
    return sizes


def _tree_letters(name: str, declared: Dimensions | Mapping[str, Dimensions], tree: Any) -> Any:
    """Letters of each array of an argument, by the name of its field where they are declared by field."""

    def letters(path: Any, array: Any) -> tuple[str, ...]:
        if isinstance(declared, Mapping):
            return tuple(_letters(path[-1].name, declared[path[-1].name], array.ndim))
        return tuple(_letters(name, declared, array.ndim))

    return jax.tree_util.tree_map_with_path(letters, tree)


def _letters(name: str, dimensions: Dimensions, rank: int) -> list[str]:
    choices = [dimensions] if isinstance(dimensions, str) else list(dimensions)
    for choice in choices:
        if len(choice.split()) == rank:
            return choice.split()
    raise ValueError(f"{name}: has {rank} dimensions; declared are {' or '.join(f'({choice})' for choice in choices)}")


def _axes(
    sizes: Mapping[str, set[int]], split: Mapping[str, tuple[str, ...]], free: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """Letter -> the axes that its dimension is split over: as many of its mesh axes, in order, as divide all of its
    sizes."""
    chosen = {}
    for letter, candidates in split.items():
        used: tuple[str, ...] = ()
        parts = 1
        for axis in candidates:
            larger = parts * free.get(axis, 1)
            if larger > parts and sizes.get(letter) and all(size % larger == 0 for size in sizes[letter]):
                used, parts = (*used, axis), larger
        if used:
            chosen[letter] = used
    return chosen
