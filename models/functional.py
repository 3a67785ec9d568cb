"""A model as pure functions of plain nested dicts of arrays, for training, populations, checkpoints and export.

NNX defines the modules; outside of them parameters are `{"embedding": ..., "stack": {"stages": {"0": ...}}}` with
string keys, whose paths are the names in checkpoints and exported files.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx, traverse_util
from jaxtyping import Array, Key

from recollect.configuration.io import flatten
from recollect.models.language_model import LanguageModel, LanguageModelModule

Params = dict[str, Any]


class FunctionalModel:
    """A config with its vocabulary, and functions of its parameters."""

    def __init__(self, config: LanguageModel, vocabulary: int):
        self.config = config
        self.vocabulary = vocabulary
        abstract = jax.eval_shape(lambda: config.build(vocabulary, nnx.Rngs(params=jax.random.key(0))))
        self._graph, state = nnx.split(abstract)
        self._variables = dict(nnx.to_flat_state(state))

    def init(self, key: Key[Array, ""]) -> Params:
        """Returns fresh parameters. Pure: may be jitted, and vmapped over keys."""
        _, state = nnx.split(self.config.build(self.vocabulary, nnx.Rngs(params=key)))
        return nest({path: variable[...] for path, variable in nnx.to_flat_state(state)})

    def bind(self, params: Params) -> LanguageModelModule:
        """Returns the module with these parameters."""
        flat = flatten(params)
        leaves = [(path, old.replace(flat[".".join(map(str, path))])) for path, old in self._variables.items()]
        return nnx.merge(self._graph, nnx.from_flat_state(leaves))

    def abstract_params(self) -> Params:
        """Returns shapes and dtypes, as jax.ShapeDtypeStruct."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def tags(self, name: str) -> Params:
        """Returns one tag of every parameter: "dims" (str), "decay" (bool), "group" (str) or "trainable" (bool); see
        recollect.layers.modules.linear.parameter."""
        return nest({path: variable.get_metadata()[name] for path, variable in self._variables.items()})


def nest(flat: dict[tuple[Any, ...], Any]) -> Params:
    """Returns {"a": {"0": x}} for {("a", 0): x}."""
    return traverse_util.unflatten_dict({tuple(map(str, path)): leaf for path, leaf in flat.items()})


def count(params: Params) -> int:
    """Returns the number of parameters."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
