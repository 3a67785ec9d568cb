"""How layers are stacked into a language model."""

from recollect.models.functional import FunctionalModel
from recollect.models.language_model import LanguageModel
from recollect.models.stack import Stage, repeat

__all__ = ["FunctionalModel", "LanguageModel", "Stage", "repeat"]
