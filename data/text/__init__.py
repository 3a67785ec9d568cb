"""Text: sources of documents, their preparation, and the rows that a model trains on.

Text(source="prepared/mine", length=1024, sequences=Packed())        # the config of a run's data
open_prepared("prepared/mine").train.tokens(0)                       # the documents themselves
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect.data.text.dataset import Text
    from recollect.data.text.preparation.prepare import Preparation
    from recollect.data.text.preparation.reader import open_prepared
    from recollect.data.text.rows import Chunked, Decomposed, Packed

__all__ = ["Chunked", "Decomposed", "Packed", "Preparation", "Text", "open_prepared"]

_MODULES = {"Text": "dataset", "Preparation": "preparation.prepare", "open_prepared": "preparation.reader"}


def __getattr__(name: str) -> Any:
    """Returns a public name, imported when asked for: workers of a preparation import this package, but not JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'rows')}"), name)
