"""Tensors of a published layout and parameters of a model here, one table for both directions.

Parameters of one stage are stacked over its repeats, kernels are (in, out), queries, keys and values are apart. A
layout has one tensor per layer, usually (out, in), sometimes several parameters in one, sometimes in another form.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np

from recollect.configuration import UserError
from recollect.configuration.io import flatten
from recollect.models import FunctionalModel, LanguageModel
from recollect.models.adaptation import nested

Params = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Form:
    """How a layout has an array: a function of ours, and its inverse. Both take numpy arrays and traced ones."""

    to: Callable[[Any], Any]
    back: Callable[[Any], Any]


PLAIN = Form(lambda array: array, lambda array: array)
TRANSPOSED = Form(lambda kernel: kernel.T, lambda weight: weight.T)
"""A linear map's kernel, (in, out), as (out, in)."""
TAPS = Form(lambda taps: taps[::-1].T[:, None], lambda weight: weight[:, 0].T[::-1])
"""Taps of a short convolution, (w, f) with the current token's first, as torch's (f, 1, w) with it last."""
CENTRED = Form(lambda gain: gain - 1, lambda weight: weight + 1)
"""A norm's gain, of which a layout stores the distance from 1."""


def shaped(ours: tuple[int, ...], theirs: tuple[int, ...]) -> Form:
    """Returns the form of an array that a layout has in another shape."""
    return Form(lambda array: array.reshape(theirs), lambda array: array.reshape(ours))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a layout: parameters side by side along their last axis.

    Attributes:
      name: in the layout.
      parts: parameters in it, by dotted name, each with where in it they are (its repeat within the stage, and maybe a
        row of that; None: all of it).
      form: of the whole.
      groups: the parts are side by side within each of so many equal groups of their last axes.
      constant: shape and value of a tensor that stands for no parameter here; what a file has there is not read.
      exact: a file must have the constant's value there.
    """

    name: str
    parts: tuple[tuple[str, Any], ...]
    form: Form = PLAIN
    groups: int = 1
    constant: tuple[tuple[int, ...], Any] | None = None
    exact: bool = False

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Returns its shape, from those of the parameters."""
        if self.constant is not None:
            return self.constant[0]
        return _shape_of(self.form, self.groups, tuple(_part_shape(shapes[name], at) for name, at in self.parts))

    def of(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Returns it, from the arrays of its parts."""
        if self.constant is not None:
            return np.full(*self.constant, np.float32)
        return self.form.to(_joined(arrays, self.groups, np))

    def split(self, array: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Returns the arrays of its parts, which have these shapes."""
        whole = self.form.back(array)
        if len(shapes) == 1:
            return [whole]
        grouped = whole.reshape(*whole.shape[:-1], self.groups, -1)
        at = np.cumsum([shape[-1] // self.groups for shape in shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(grouped, at, axis=-1), shapes, strict=True)]


def _joined(arrays: list[Any], groups: int, library: Any) -> Any:
    if len(arrays) == 1:
        return arrays[0]
    parts = [array.reshape(*array.shape[:-1], groups, -1) for array in arrays]
    return library.concatenate(parts, axis=-1).reshape(*arrays[0].shape[:-1], -1)


def _part_shape(shape: tuple[int, ...], at: Any) -> tuple[int, ...]:
    return shape[0 if at is None else 1 if isinstance(at, int) else len(at) :]


@functools.lru_cache(maxsize=4096)
def _shape_of(form: Form, groups: int, parts: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor; nothing is allocated."""
    abstract = [jax.ShapeDtypeStruct(shape, np.float32) for shape in parts]
    return jax.eval_shape(lambda arrays: form.to(_joined(arrays, groups, jnp)), abstract).shape


def with_own_head(params: Params, model: LanguageModel) -> tuple[Params, LanguageModel]:
    """Returns a tied model, and its parameters, as one whose head is a copy of the embedding."""
    head = {"kernel": np.asarray(params["embedding"]).T}
    return {**params, "head": head}, chz.replace(model, tied=False)


class LayerTensors:
    """Builds the table of one model.

    Args:
      layer: beginning of a layer's names in the layout, with "{}" for its number.
    """

    def __init__(self, model: LanguageModel, layer: str):
        self.tensors: list[Tensor] = []
        self.model = model
        self._layer = layer
        self.places = [
            (f"stack.stages.{number}.{offset}", repeat, mixer)
            for number, stage in enumerate(model.stages)
            for repeat in range(stage.repeats)
            for offset, mixer in enumerate(stage.pattern)
        ]

    def add(self, name: str, ours: str, form: Form = PLAIN) -> None:
        """Adds a tensor that no layer has."""
        self.tensors.append(Tensor(name, ((ours, None),), form))

    def add_layers(
        self, name: str, *ours: str, of: Any = None, form: Form = PLAIN, groups: int = 1, row: int | None = None
    ) -> None:
        """Adds a tensor of every layer, or of every one whose mixer's config is an `of`, a class or a config: the
        parameters `ours` of its block, or a row of them."""
        for number, (place, repeat, mixer) in enumerate(self.places):
            if of is None or type(mixer) is of or mixer == of:
                at = repeat if row is None else (repeat, row)
                parts = tuple((f"{place}.{part}", at) for part in ours)
                self.tensors.append(Tensor(self._layer.format(number) + name, parts, form, groups))

    def add_linear(
        self,
        name: str,
        *ours: str,
        of: Any = None,
        bias: bool = False,
        form: Form = TRANSPOSED,
        groups: int = 1,
    ) -> None:
        """Adds weight and bias of a linear map of every layer: of several side by side where the layout fuses them."""
        self.add_layers(f"{name}.weight", *(f"{part}.kernel" for part in ours), of=of, form=form, groups=groups)
        if bias:
            self.add_layers(f"{name}.bias", *(f"{part}.bias" for part in ours), of=of, groups=groups)

    def add_constant(
        self, name: str, shape: tuple[int, ...], value: float = 0.0, *, first: int = 0, exact: bool = False
    ) -> None:
        """Adds a tensor of every layer from the `first` on that stands for no parameter here."""
        for number in range(first, len(self.places)):
            whole = self._layer.format(number) + name
            self.tensors.append(Tensor(whole, (), constant=(shape, value), exact=exact))


def to_layout(params: Params, tensors: list[Tensor], model: LanguageModel) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and array of every tensor, sorted by name.

    Raises:
      UserError: a constant of the model (a decay that depends on the layer's place, say) is another than its place
        gives it, which no layout can store.
      ValueError: a parameter is in no tensor, or in more than one.
    """
    flat = flatten(params)
    fixed = fixed_values(model, params["embedding"].shape[0])
    for name, value in fixed.items():
        if not np.allclose(flat[name], value, atol=1e-6):
            raise UserError(f"{name} is not what the place of its layer gives it, and no layout stores it")
    left = {name: leaf.size for name, leaf in flat.items() if name not in fixed}
    for part, at in {part for tensor in tensors for part in tensor.parts}:
        left[part] -= flat[part][... if at is None else at].size
    if any(left.values()) or len(parts := [part for tensor in tensors for part in tensor.parts]) != len(set(parts)):
        raise ValueError(f"parameters and layout differ: {[name for name, size in left.items() if size][:3]}")
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        arrays = [np.asarray(flat[name] if at is None else flat[name][at]) for name, at in tensor.parts]
        yield tensor.name, np.ascontiguousarray(tensor.of(arrays), np.float32)


def from_layout(arrays: dict[str, np.ndarray], tensors: list[Tensor], model: LanguageModel, vocabulary: int) -> Params:
    """Returns parameters, fp32, from the arrays of a layout, which were checked by `check_shapes`.

    Raises:
      UserError: a tensor that must have a constant's value has another.
    """
    shapes = _shapes(model, vocabulary)
    flat = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for name, value in fixed_values(model, vocabulary).items():
        flat[name][...] = value
    for tensor in tensors:
        if tensor.exact and not np.array_equal(arrays[tensor.name], tensor.of([])):
            raise UserError(f"{tensor.name} is not what stands for leaving it out, and this project lacks what it adds")
        if tensor.constant is None:
            of_parts = [_part_shape(shapes[name], at) for name, at in tensor.parts]
            for (name, at), part in zip(tensor.parts, tensor.split(arrays[tensor.name], of_parts), strict=True):
                flat[name][... if at is None else at] = part
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


def fixed_values(model: LanguageModel, vocabulary: int) -> dict[str, np.ndarray]:
    """Returns the parameters that are never trained: constants, given by the places of their layers."""
    functional = _functional(model, vocabulary)
    fixed = [name for name, trainable in flatten(functional.tags("trainable")).items() if not trainable]
    if not fixed:
        return {}

    def values() -> dict[str, jax.Array]:
        flat = flatten(functional.init(jax.random.key(0)))
        return {name: flat[name] for name in fixed}

    return {name: np.asarray(value) for name, value in jax.jit(values)().items()}


@functools.lru_cache(maxsize=4)
def _functional(model: LanguageModel, vocabulary: int) -> FunctionalModel:
    return FunctionalModel(model, vocabulary)


def _shapes(model: LanguageModel, vocabulary: int) -> Shapes:
    return {name: leaf.shape for name, leaf in flatten(_functional(model, vocabulary).abstract_params()).items()}
