"""Tensors of a published layout and parameters of a model here, one table for both directions.

Parameters of one stage are stacked over its repeats, kernels are (in, out), queries, keys and values are apart. A
layout has one tensor per layer, usually (out, in), sometimes several parameters in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.configuration.io import flatten
from recollect.models import FunctionalModel, LanguageModel
from recollect.models.adaptation import nested

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a layout: parameters side by side along their last axis.

    Attributes:
      name: in the layout.
      parts: parameters in it, by dotted name, each with its index within the stage's repeats (None: not stacked).
      transposed: whether the layout has (out, in).
    """

    name: str
    parts: tuple[tuple[str, int | None], ...]
    transposed: bool = False

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Returns its shape, from those of the parameters."""
        of_parts = [shapes[name][index is not None :] for name, index in self.parts]
        whole = (*of_parts[0][:-1], sum(shape[-1] for shape in of_parts))
        return whole[::-1] if self.transposed else whole


class LayerTensors:
    """Builds the table of one model.

    Args:
      layer: beginning of a layer's names in the layout, with "{}" for its number.
    """

    def __init__(self, model: LanguageModel, layer: str):
        self.tensors: list[Tensor] = []
        self._layer = layer
        self._places = [
            (f"stack.stages.{number}.{offset}", repeat)
            for number, stage in enumerate(model.stages)
            for repeat in range(stage.repeats)
            for offset in range(len(stage.pattern))
        ]

    def add(self, name: str, ours: str, *, transposed: bool = False) -> None:
        """Adds a tensor that no layer has."""
        self.tensors.append(Tensor(name, ((ours, None),), transposed))

    def add_layers(self, name: str, *ours: str, transposed: bool = False) -> None:
        """Adds a tensor of every layer, of the parameters `ours` of its block."""
        for number, (place, repeat) in enumerate(self._places):
            parts = tuple((f"{place}.{part}", repeat) for part in ours)
            self.tensors.append(Tensor(self._layer.format(number) + name, parts, transposed))

    def add_linear(self, name: str, *ours: str, bias: bool, transposed: bool = True) -> None:
        """Adds weight and bias of a linear map of every layer: of several side by side where the layout fuses them."""
        self.add_layers(f"{name}.weight", *(f"{part}.kernel" for part in ours), transposed=transposed)
        if bias:
            self.add_layers(f"{name}.bias", *(f"{part}.bias" for part in ours))


def to_layout(params: Params, tensors: list[Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and array of every tensor, sorted by name.

    Raises:
      ValueError: a parameter is in no tensor, or in more than one.
    """
    flat = flatten(params)
    used = sorted(part for tensor in tensors for part in tensor.parts)
    stacked = {name for name, index in used if index is not None}
    there = sorted(
        (name, index) for name, leaf in flat.items() for index in (range(leaf.shape[0]) if name in stacked else (None,))
    )
    if used != there:
        raise ValueError(f"parameters and layout differ: {sorted(set(used) ^ set(there), key=str)[:3]}")
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        parts = [np.asarray(flat[name] if index is None else flat[name][index]) for name, index in tensor.parts]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        yield tensor.name, np.ascontiguousarray(array.T if tensor.transposed else array)


def from_layout(arrays: dict[str, np.ndarray], tensors: list[Tensor], model: LanguageModel, vocabulary: int) -> Params:
    """Returns parameters, fp32, from the arrays of a layout, which were checked by `check_shapes`."""
    shapes = _shapes(model, vocabulary)
    flat = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for tensor in tensors:
        array = arrays[tensor.name].T if tensor.transposed else arrays[tensor.name]
        at = 0
        for name, index in tensor.parts:
            size = shapes[name][-1]
            flat[name][... if index is None else index] = array[..., at : at + size]
            at += size
    return nested(flat)


def check_shapes(
    stored: dict[str, tuple[int, ...]], tensors: list[Tensor], model: LanguageModel, vocabulary: int, where: str
) -> None:
    """Checks the tensors of a file against those that its config asks for, before any is read.

    Raises:
      UserError: one is missing, has another shape, or has no place in the model.
    """
    shapes = _shapes(model, vocabulary)
    expected = {tensor.name: tensor.shape(shapes) for tensor in tensors}
    for name, shape in expected.items():
        if name not in stored:
            raise UserError(f"{where}: there is no tensor {name}, which its config.json asks for")
        if stored[name] != shape:
            raise UserError(f"{where}: {name} is {list(stored[name])}; its config.json asks for {list(shape)}")
    if rest := sorted(stored.keys() - expected.keys()):
        raise UserError(f"{where}: {rest[0]} has no place in the model that its config.json describes")


def _shapes(model: LanguageModel, vocabulary: int) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in flatten(FunctionalModel(model, vocabulary).abstract_params()).items()}
