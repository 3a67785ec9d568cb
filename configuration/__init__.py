"""Typed, frozen configuration: the base class, overrides from the command line, and JSON.

The config classes of every package derive from `Config`. This package imports nothing of the project.
"""

from recollect.configuration.base import (
    Config,
    Preempted,
    UserError,
    at_least,
    exported_names,
    lazy_names,
    requires,
    to_json,
)

__getattr__, _lazy = lazy_names(
    __name__,
    {
        "deserialization": "differences from_json",
        "field_types": "get_field",
        "names": "config_class known_configs",
        "overrides": "apply_overrides apply_values",
    },
)
__all__ = ["Config", "Preempted", "UserError", "at_least", "exported_names", "requires", "to_json", *_lazy]
