"""What a layout cannot express is refused in a line that names the field; so is what a config.json asks for in vain."""

from __future__ import annotations

import math
from typing import Any

import chz

from recollect.configuration import Config, UserError
from recollect.models import LanguageModel


def require(holds: bool, path: str, value: Any, reason: str) -> None:
    """Raises UserError unless `holds`: `path`=`value` stands in the way for this reason."""
    if not holds:
        shown = type(value).__name__ if isinstance(value, Config) else value
        raise UserError(f"{path}={shown} stands in the way of a Hugging Face export: {reason}")


def require_defaults(config: Config, path: str, expressed: set[str]) -> None:
    """Raises UserError where a field that no layout expresses has another value than its default."""
    for name, field in chz.chz_fields(type(config)).items():
        if name not in expressed:
            value = getattr(config, name)
            require(value == field._default, f"{path}.{name}", value, "no layout has it")


_EXPRESSED = {"width", "stages", "norm", "mlp", "positions", "residual", "tied"}
_TRAINING_ONLY = {"embedding_dropout", "initialisation", "dtype", "remat", "lora", "unroll"}


def require_expressible(model: LanguageModel, *, as_code: bool = False) -> None:
    """Raises UserError where the model's own fields, or its class, are in no layout, or not in PyTorch code."""
    require(type(model) is LanguageModel, "model", model, "it takes language models")
    require_defaults(model, "model", _EXPRESSED | _TRAINING_ONLY | ({"canon"} if as_code else set()))


_WORKED_OUT = {"key_heads", "head_dim", "key_dim", "value_dim", "channels", "rank"}
"""Sizes that a mixer works out from the width where they are None."""


def require_same(model: LanguageModel, again: LanguageModel, layout: str) -> None:
    """Raises UserError, with the first field that differs, unless the model that a layout's config.json describes is
    the one that was exported. Sizes that are None, which mixers work out from the width, are what they work out."""
    _same(model.norm, again.norm, "norm", layout)
    mlp, other = (
        each and chz.replace(each, hidden=each.inner(model.width), expansion=1.0) for each in (model.mlp, again.mlp)
    )
    _same(mlp, other, "mlp", layout)
    require(model.tied == again.tied, "model.tied", model.tied, f"{layout} has {again.tied}")
    for number, (mixer, mixer_again) in enumerate(zip(model.mixers, again.mixers, strict=True)):
        _same(mixer, mixer_again, f"layer {number}: {type(mixer).__name__}", layout)


def _same(value: Any, other: Any, path: str, layout: str) -> None:
    if type(value) is type(other) and isinstance(value, Config):
        for name in chz.chz_fields(type(value)).keys() - {"dropout"}:  # which is training's
            _same(getattr(value, name), getattr(other, name), f"{path}.{name}", layout)
    elif not (value is None and type(other) is int and path.rpartition(".")[2] in _WORKED_OUT):
        has = type(other).__name__ if isinstance(other, Config) else other
        require(value == other, path, value, f"{layout} has {has}")


def fields_of(model: LanguageModel, layout: Any) -> dict[str, Any]:
    """Returns the fields of config.json of a model in a layout; raises UserError where they do not describe it."""
    fields = layout.config_of(model)
    again = HuggingFaceConfig({**fields, "tie_word_embeddings": model.tied}, fields["model_type"])
    require_same(model, layout.model_of(again), fields["model_type"])
    return fields


class HuggingFaceConfig:
    """A config.json of the transformers library, read field by field; raises UserError for a value that cannot be.

    Args:
      where: its path, for errors.
    """

    def __init__(self, fields: dict[str, Any], where: str):
        self.fields, self.where = fields, where

    def whole(self, name: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        """Returns a positive whole number; without a default it must be there."""
        value = self.fields.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise UserError(f"{self.where}: {name}={value!r}: must be a whole number from 1 to {most:,}")
        return value

    def number(self, name: str, default: float, fields: dict[str, Any] | None = None) -> float:
        """Returns a positive number of this object, or of `fields`."""
        value = (self.fields if fields is None else fields).get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{self.where}: {name}={value!r}: must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Returns true or false."""
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name}={value!r}: must be true or false")
        return value

    def one_of(self, name: str, default: Any, *known: Any) -> Any:
        """Returns a value that must be one of `known`."""
        value = self.fields.get(name, default)
        if not any(value is each or (type(value) is type(each) and value == each) for each in known):
            listed = " or ".join(map(repr, known))
            raise UserError(f"{self.where}: {name}={value!r}: this project has {listed} only")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """Returns an object; an empty one where it is not there."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.where}: {name} must be an object")
        return value or {}
