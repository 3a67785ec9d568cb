"""What `recollect diagnose` prints about a run: `look` into its newest checkpoint, `advice` from its numbers."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__, {"advice": "Advice advise", "look": "Example Look Part distances look_into", "text": "lines_of"}
)
