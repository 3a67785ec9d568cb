"""Kernels under a mesh. XLA cannot partition them ("Mosaic kernels cannot be automatically partitioned"), so each device runs its own part.

An operation declares the dimensions of its arrays by letters and wraps the form that holds kernels:

    forward = over_mesh(tpu.forward, {"q": "b t h k", "v": "b t h v", "log_decay": ("h", "b t h", "b t h k")}, ("b t h v", "b h k v"))

`forward` then is a shard_map wherever the ambient mesh (jax.set_mesh, jax.sharding.use_abstract_mesh) has axes larger than 1: sequences (b)
split over data and fsdp, heads (h) over tensor. The other dimensions stay whole, so every device works on all tokens of its sequences.
Elsewhere it is the function itself. Gradients pass through; the function's own custom_vjp is used on each device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

Dimensions = str | Sequence[str]
"""Letters of an array's dimensions, blanks between; several where its rank may differ."""

SPLIT: Mapping[str, tuple[str, ...]] = {"b": ("data", "fsdp"), "h": ("tensor",)}
"""Letter -> mesh axes, the first outermost."""


def over_mesh(
    function: Callable[..., Any],
    arguments: Mapping[str, Dimensions],
    results: Any,
    *,
    split: Mapping[str, tuple[str, ...]] = SPLIT,
) -> Callable[..., Any]:
    """`function`, run by each device of the ambient mesh on its part.

    Args:
      function: takes and returns arrays. On a part it must compute that part of the whole: each split letter is a batch dimension.
      arguments: parameter's name -> letters. An array may be None; parameters not named here hold no arrays that are traced.
        Arrays may have different sizes under one letter (grouped heads): part i of one meets part i of the others. Size 1 serves all parts.
      results: letters of the result (Dimensions), or a tuple of them for a tuple of results, of which any may be None.
      split: letter -> mesh axes. An axis that does not divide a letter's sizes is not used: its devices repeat the work.

    Raises:
      ValueError: `function` has no parameter of a name in `arguments`; when called, that an array's rank is none of those declared.
    """
    signature = inspect.signature(function)
    unknown = arguments.keys() - signature.parameters.keys()
    if unknown:
        raise ValueError(f"{getattr(function, '__name__', function)} has no parameters {', '.join(sorted(unknown))}")

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        free = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
        if all(mesh.shape[name] == 1 for name in free):
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs).arguments
        arrays = {name: bound[name] for name in arguments if bound.get(name) is not None}
        letters = {name: _letters(name, arguments[name], array.ndim) for name, array in arrays.items()}
        axes = _axes(arrays, letters, split, {name: mesh.shape[name] for name in free})

        def part(arrays: dict[str, jax.Array]) -> Any:
            call = signature.bind(*args, **kwargs)
            call.arguments.update(arrays)
            return function(*call.args, **call.kwargs)

        def spec(letters: list[str], shape: tuple[int, ...]) -> PartitionSpec:
            return PartitionSpec(*(axes.get(letter) if size > 1 else None for letter, size in zip(letters, shape, strict=True)))

        given = {name: spec(letters[name], array.shape) for name, array in arrays.items()}
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
        return jax.shard_map(part, in_specs=(given,), out_specs=out, axis_names=set(free), check_vma=False)(arrays)

    return wrapped


def _letters(name: str, dimensions: Dimensions, rank: int) -> list[str]:
    choices = [dimensions] if isinstance(dimensions, str) else list(dimensions)
    for choice in choices:
        if len(choice.split()) == rank:
            return choice.split()
    raise ValueError(f"{name}: has {rank} dimensions; declared are {' or '.join(f'({choice})' for choice in choices)}")


def _axes(
    arrays: Mapping[str, Any], letters: Mapping[str, list[str]], split: Mapping[str, tuple[str, ...]], free: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """Letter -> the axes that its dimension is split over: as many of its mesh axes, in order, as divide all of its sizes."""
    chosen = {}
    for letter, candidates in split.items():
        sizes = {
            array.shape[index]
            for name, array in arrays.items()
            for index, own in enumerate(letters[name])
            if own == letter and array.shape[index] > 1
        }
        used: tuple[str, ...] = ()
        parts = 1
        for axis in candidates:
            larger = parts * free.get(axis, 1)
            if larger > parts and sizes and all(size % larger == 0 for size in sizes):
                used, parts = (*used, axis), larger
        if used:
            chosen[letter] = used
    return chosen
