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
from recollect.models.encoder import example_source
from recollect.models.language_model import LanguageModel, LanguageModelModule, state_bytes

Params = dict[str, Any]


class FunctionalModel:
    """A config with its vocabulary, and functions of its parameters; `frozen`: see `Optimizer`."""

    def __init__(self, config: LanguageModel, vocabulary: int, frozen: str | tuple[str, ...] | None = None):
        self.config, self.vocabulary = config, vocabulary
        self.adaptation: Any = None
        abstract = jax.eval_shape(lambda: config.build(vocabulary, nnx.Rngs(params=jax.random.key(0))))
        self._graph, state = nnx.split(abstract)
        self._variables = dict(nnx.to_flat_state(state))
        if config.lora is not None or frozen:
            from recollect.models.adaptation import Adaptation

            self.adaptation = Adaptation(self, frozen or ())

    def init(self, key: Key[Array, ""]) -> Params:
        """Returns fresh parameters. Pure: may be jitted, and vmapped over keys."""
        _, state = nnx.split(self.config.build(self.vocabulary, nnx.Rngs(params=key)))
        params = nest({path: variable[...] for path, variable in nnx.to_flat_state(state)})
        return params if self.adaptation is None else self.adaptation.init(params, key)

    def bind(self, params: Params) -> LanguageModelModule:
        """Returns the module with these parameters."""
        flat = flatten(params if self.adaptation is None else self.adaptation.effective(params))
        leaves = [(path, old.replace(flat[".".join(map(str, path))])) for path, old in self._variables.items()]
        return nnx.merge(self._graph, nnx.from_flat_state(leaves))

    def abstract_params(self) -> Params:
        """Returns shapes and dtypes, as jax.ShapeDtypeStruct."""
        shapes = {path: variable.get_value() for path, variable in self._variables.items()}
        if self.adaptation is None:
            return nest(shapes)
        return jax.eval_shape(self.adaptation.init, nest(shapes), jax.random.key(0))

    def abstract_state(self, length: int) -> Any:
        """Returns shapes and dtypes of the layers' decoding states of one sequence (and source) of `length` tokens."""
        sizes = (1, length, None if self.config.encoder is None else example_source(length))
        return jax.eval_shape(lambda params: self.bind(params).init_state(*sizes).layers, self.abstract_params())

    def tags(self, name: str) -> Params:
        """Returns one tag of every parameter: "dims" (str), "decay" (bool), "group" (str) or "trainable" (bool); see
        recollect.layers.modules.linear.parameter."""
        tags = nest({path: variable.get_metadata()[name] for path, variable in self._variables.items()})
        return tags if self.adaptation is None else self.adaptation.tags(name, tags)


def nest(flat: dict[tuple[Any, ...], Any]) -> Params:
    """Returns {"a": {"0": x}} for {("a", 0): x}."""
    return traverse_util.unflatten_dict({tuple(map(str, path)): leaf for path, leaf in flat.items()})


def count(params: Params) -> int:
    """Returns the number of parameters."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))


def state_bytes_at(config: LanguageModel, vocabulary: int, lengths: list[int]) -> dict[str, int]:
    """Returns the bytes of the decoding state of one sequence, for streams of the given lengths, without the model's
    own cursor. Keys are strings, as in JSON; lengths that the model cannot take (or stream) are left out."""
    limit = config.maximum_length() if all(mixer.traits.streams for mixer in config.mixers) else 0
    fitting = [length for length in lengths if limit is None or length <= limit]
    model = FunctionalModel(config, vocabulary)
    return {str(length): state_bytes(model.abstract_state(length)) for length in fitting}
