"""Low-rank updates of linear maps, and frozen parameters.

The parameters of a model with `LanguageModel.lora` have two more for each chosen linear map: "lora.PATH.a" and
"lora.PATH.b" beside "PATH.kernel". W + alpha / rank A B is formed from them before the model is called, so that no
mixer knows of it: every mixer's linear maps can be adapted, and streaming, sharding and populations are as without.

Easy to get wrong: the update is a matrix as large as W, so a step saves the optimizer's state and not the products.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable
from typing import Any

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError
from recollect.configuration.io import flatten
from recollect.configuration.names import nearest
from recollect.models.functional import FunctionalModel, Params, nest
from recollect.models.language_model import LanguageModel

Patterns = str | tuple[str, ...]

_KERNEL = ".kernel"
_TAGS: dict[str, Any] = {"decay": True, "group": "default", "trainable": True}


class Adaptation:
    """The low-rank updates and the frozen parameters of one model.

    Args:
      model: without any yet; `lora` of its config says which linear maps are updated.
      frozen: patterns of the names of parameters that are not trained; "lora." begins those of updates.

    Raises:
      UserError: a pattern matches nothing (the nearest names are given), or nothing is left to train.
    """

    def __init__(self, model: FunctionalModel, frozen: Patterns):
        self._lora = model.config.lora
        self._shapes = flatten(model.abstract_params())
        dims = flatten(model.tags("dims"))
        self._dims: dict[str, str] = {}
        untrained: set[str] = set()
        if self._lora is not None:
            linear = {name.removesuffix(_KERNEL) for name, letters in dims.items() if _is_linear(name, letters)}
            for name in sorted(matching(self._lora.layers, linear, "model.lora.layers")):
                inputs, outputs = dims[name + _KERNEL].split()
                self._dims |= {f"lora.{name}.a": f"{inputs} l", f"lora.{name}.b": f"l {outputs}"}
            untrained = set() if self._lora.train_rest else set(dims)
        if frozen:
            untrained |= matching(frozen, dims.keys() | self._dims.keys(), "optimizer.frozen")
            if untrained >= dims.keys() | self._dims.keys():
                raise UserError("optimizer.frozen leaves no parameter to train; name fewer of them")
        self.untrained = frozenset(untrained)

    def init(self, params: Params, key: Key[Array, ""]) -> Params:
        """Returns fresh parameters with those of the updates, which change nothing yet."""
        updates: dict[str, Any] = {}
        for name in self._dims:
            layer, _, part = name.removeprefix("lora.").rpartition(".")
            *repeats, inputs, outputs = self._shapes[layer + _KERNEL].shape
            rank = self._lora.rank if self._lora is not None else 0
            if part == "b":
                updates[name] = jnp.zeros((*repeats, rank, outputs), jnp.float32)
                continue
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            drawn = jax.random.normal(jax.random.fold_in(key, number), (*repeats, inputs, rank), jnp.float32)
            updates[name] = drawn * inputs**-0.5
        return nested(flatten(params) | updates)

    def effective(self, params: Params) -> Params:
        """Returns the parameters that the model computes with: updates added, no gradient to what is not trained."""
        flat = {
            name: jax.lax.stop_gradient(leaf) if name in self.untrained else leaf
            for name, leaf in flatten(params).items()
        }
        for name in [name for name in self._dims if name.endswith(".a")]:
            layer = name.removeprefix("lora.").removesuffix(".a")
            assert self._lora is not None
            update = jnp.matmul(flat.pop(name), flat.pop(f"lora.{layer}.b"))
            flat[layer + _KERNEL] = flat[layer + _KERNEL] + self._lora.alpha / self._lora.rank * update
        return nested(flat)

    def tags(self, name: str, tags: Params) -> Params:
        """Returns one tag of every parameter (see `FunctionalModel.tags`), given those of the model without updates."""
        flat = flatten(tags) | (self._dims if name == "dims" else dict.fromkeys(self._dims, _TAGS[name]))
        if name == "trainable":
            flat = {path: tag and path not in self.untrained for path, tag in flat.items()}
        return nested(flat)


def nested(flat: dict[str, Any]) -> Params:
    """Returns {"a": {"0": x}} for {"a.0": x}."""
    return nest({tuple(name.split(".")): leaf for name, leaf in flat.items()})


def _is_linear(name: str, letters: str) -> bool:
    return name.endswith(_KERNEL) and len(letters.split()) == 2


def matching(patterns: Patterns, names: Iterable[str], said: str) -> set[str]:
    """Returns the dotted names that patterns match, as a whole or up to a dot: "stack" and "stack.*" match all of the
    stack.

    Args:
      patterns: with * and ?, as a tuple or separated by commas.
      said: the field that has them, for errors.

    Raises:
      UserError: a pattern matches no name; the nearest ones are given.
    """
    names, matched = sorted(names), set()
    for pattern in patterns.split(",") if isinstance(patterns, str) else patterns:
        pattern = pattern.strip()
        hits = {name for name in names if any(fnmatch.fnmatchcase(name, end) for end in (pattern, f"{pattern}.*"))}
        if not hits:
            parts = [name.split(".") for name in names]
            known = {".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)}
            known |= {f"*.{word}" for part in parts for word in part[1:] if not word.isdigit()}
            raise UserError(
                f"{said}={pattern}: matches no parameter{nearest(pattern, known) or f'; one is {names[0]}'}"
            )
        matched |= hits
    return matched


def merged(params: Params, config: LanguageModel, vocabulary: int) -> tuple[Params, LanguageModel]:
    """Returns parameters with their low-rank updates added to the weights, and the config of a model without any; as
    they are where it has none."""
    if config.lora is None:
        return params, config
    adaptation = FunctionalModel(config, vocabulary).adaptation
    assert adaptation is not None
    return adaptation.effective(params), chz.replace(config, lora=None)
