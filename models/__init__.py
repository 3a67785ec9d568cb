"""How layers are stacked into a language model."""

from models.functional import FunctionalModel
from models.language_model import LanguageModel
from models.stack import Stage, repeat

__all__ = ["FunctionalModel", "LanguageModel", "Stage", "repeat"]
