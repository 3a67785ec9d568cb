"""A model as pure functions of plain nested dicts of arrays: what training, populations, checkpoints and export work
with.

NNX defines the modules; outside of them parameters are `{"embedding": ..., "stack": {"stages": {"0": ...}}}` with
string keys, whose paths are the names in checkpoints and exported files.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from recollect.models.language_model import LanguageModel, LanguageModelModule, state_bytes

Params = dict[str, Any]


class FunctionalModel:
    """`config` with its vocabulary, and functions of its parameters."""

    def __init__(self, config: LanguageModel, vocabulary: int):
        self.config = config
        self.vocabulary = vocabulary
        abstract = jax.eval_shape(lambda: config.build(vocabulary, nnx.Rngs(params=jax.random.key(0))))
        self._graph, state = nnx.split(abstract)
        self._paths = [path for path, _ in nnx.to_flat_state(state)]
        self._leaves = dict(nnx.to_flat_state(state))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters. Pure: may be jitted, and vmapped over keys."""
        _, state = nnx.split(self.config.build(self.vocabulary, nnx.Rngs(params=key)))
        return nest({path: variable[...] for path, variable in nnx.to_flat_state(state)})

    def bind(self, params: Params) -> LanguageModelModule:
        """The module with these parameters."""
        leaves = [(path, self._leaves[path].replace(_get(params, path))) for path in self._paths]
        return nnx.merge(self._graph, nnx.from_flat_state(leaves))

    def abstract_params(self) -> Params:
        """Shapes and dtypes, as jax.ShapeDtypeStruct."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def tags(self, name: str) -> Params:
        """One tag of every parameter: "decay" (bool), "group" (str) or "trainable" (bool); see
        recollect.layers.modules.linear.parameter."""
        return nest({path: variable.get_metadata()[name] for path, variable in self._leaves.items()})


def nest(flat: dict[tuple[Any, ...], Any]) -> Params:
    """{("a", 0): x} to {"a": {"0": x}}."""
    nested: Params = {}
    for path, leaf in flat.items():
        inner = nested
        for name in path[:-1]:
            inner = inner.setdefault(str(name), {})
        inner[str(path[-1])] = leaf
    return nested


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """{"a": {"0": x}} to {"a.0": x}, in the dict's order."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))


def _get(params: Params, path: tuple[Any, ...]) -> Any:
    value: Any = params
    for name in path:
        value = value[str(name)]
    return value


def state_bytes_at(config: LanguageModel, vocabulary: int, lengths: list[int]) -> dict[str, int]:
    """Returns the bytes of one sequence's decoding state by length of the stream, without the model's own cursor.

    Keys are strings, as JSON has them. Lengths that the model cannot take are left out.
    """
    limit = config.maximum_length()
    possible = [length for length in lengths if limit is None or length <= limit]
    return {str(length): state_bytes(_abstract_state(config, vocabulary, length)) for length in possible}


def state_elements_at(config: LanguageModel, vocabulary: int, length: int) -> int:
    """Returns the number of array elements in that state."""
    return sum(leaf.size for leaf in jax.tree.leaves(_abstract_state(config, vocabulary, length)))


def _abstract_state(config: LanguageModel, vocabulary: int, length: int) -> Any:
    model = FunctionalModel(config, vocabulary)
    return jax.eval_shape(lambda params: model.bind(params).init_state(1, length).layers, model.abstract_params())
