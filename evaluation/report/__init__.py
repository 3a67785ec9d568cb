"""One HTML page about a study or some runs: `gather` reads their folders, `page` writes what was read."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"page": "write_report"})
