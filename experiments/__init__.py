"""What is run: modules of functions that return an `Experiment` or a `Study`, found by name without being imported."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"mqar": "recall", "registry": "Entry entries load", "study": "Study grid"})
