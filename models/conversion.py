"""The parameters of a trained model in a model of other mixers.

    params = converted(params, before, after, vocabulary)

Layers are matched by their places, parameters by their names. What the softmax family shares (projections, norms of
queries and keys) is kept, and so is everything around the mixers. What is new starts where it changes least:

- routers of `MixtureOfHeads` are zero, so that all heads weigh alike. With all heads on, gates of "ones" (which have no
  routers) and of "code" give the model that there was; gates of "paper" scale it down.
- the landmarks' vector is the mean of the embedding (Mohtashami & Jaggi 2023, the published fine-tuning of LLaMA). Up
  to the first landmark the model is the one that there was.
- `SlidingWindow` has nothing new: it is the same up to `window` tokens. Learned sinks start as drawn.
- Hedgehog's maps of `LinearAttention` start as the identity, to be trained by
  `recollect.training.attention_transfer`; key heads that several heads share are copied for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from recollect.configuration import UserError
from recollect.configuration.io import flatten
from recollect.models.adaptation import nested
from recollect.models.functional import FunctionalModel, Params
from recollect.models.language_model import LanguageModel

_SHARED = ("mixer.key.kernel", "mixer.value.kernel")
"""Projections of key heads, which several heads may share."""


def converted(params: Params, before: LanguageModel, after: LanguageModel, vocabulary: int, seed: int = 0) -> Params:
    """Returns parameters (numpy, fp32) of `after` that say what those of `before` say, as far as its mixers can.

    Args:
      params: of `before`, without low-rank updates (`models.adaptation.merged`).
      seed: of new parameters that are drawn.

    Raises:
      UserError: the numbers of layers differ, or a parameter has no place or another shape in its layer of `after`.
    """
    if len(before.mixers) != len(after.mixers):
        raise UserError(f"a model of {len(before.mixers)} layers cannot become one of {len(after.mixers)}")
    drawn = {name: np.array(leaf) for name, leaf in flatten(_drawn(after, vocabulary, seed)).items()}
    old, new = _by_layer(params, before), _by_layer(nested(drawn), after)
    mixers = [*zip(before.mixers, after.mixers, strict=True), (None, None)]
    for layer, (there, here, (mixer, other)) in enumerate(zip(old, new, mixers, strict=True)):
        where = f"layer {layer}: " if mixer else ""
        if lost := sorted(there.keys() - here.keys()):
            raise UserError(f"{where}{type(other or after).__name__} has no {lost[0]}, which was trained")
        heads: Any = getattr(mixer, "key_heads", None) or getattr(mixer, "heads", 1)
        for name, array in here.items():
            if name in there:
                array[...] = _fitted(there[name], array.shape, heads, where + name)
            elif name.endswith("_router.kernel"):
                array[...] = 0
            elif name == "landmark":
                array[...] = there["embedding"].mean(0) * after.embedding_scale
    return nested(drawn)


def _drawn(model: LanguageModel, vocabulary: int, seed: int) -> Params:
    return jax.jit(FunctionalModel(model, vocabulary).init)(jax.random.key(seed))


def _by_layer(params: Params, model: LanguageModel) -> list[dict[str, np.ndarray]]:
    """Returns views of each layer's arrays by their names within it, then of the rest."""
    flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    layers = [
        {name.removeprefix(place): leaf[repeat] for name, leaf in flat.items() if name.startswith(place)}
        for place, repeat in _places(model)
    ]
    return [*layers, {name: leaf for name, leaf in flat.items() if not name.startswith("stack.")}]


def _places(model: LanguageModel) -> Iterator[tuple[str, int]]:
    """Yields the beginning of the names of every layer's parameters, and its repeat within their arrays."""
    for number, stage in enumerate(model.stages):
        for repeat in range(stage.repeats):
            for offset in range(len(stage.pattern)):
                yield f"stack.stages.{number}.{offset}.", repeat


def _fitted(array: np.ndarray, shape: tuple[int, ...], key_heads: int, where: str) -> np.ndarray:
    """Returns an array in a shape: its own, or with a copy of each key head for each of the heads that share it."""
    if array.shape == shape:
        return array
    copies = shape[-1] // array.shape[-1]
    if not where.endswith(_SHARED) or array.shape[:-1] != shape[:-1] or copies * array.shape[-1] != shape[-1]:
        raise UserError(f"{where} is {array.shape}, and {shape} is needed")
    heads = array.reshape(*array.shape[:-1], key_heads, -1)
    return heads.repeat(copies, axis=-2).reshape(shape)
