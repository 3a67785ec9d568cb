"""Typed, frozen configuration: the base class, overrides from the command line, and JSON.

The config classes of every package derive from `Config`. This package imports nothing of the project.
"""

from recollect.configuration.base import Config, Preempted, UserError, at_least, exported_names, requires, to_json
from recollect.configuration.deserialization import differences, from_json
from recollect.configuration.field_types import get_field
from recollect.configuration.names import config_class, known_configs
from recollect.configuration.overrides import apply_overrides, apply_values

__all__ = [
    "Config",
    "Preempted",
    "UserError",
    "apply_overrides",
    "apply_values",
    "at_least",
    "config_class",
    "differences",
    "exported_names",
    "from_json",
    "get_field",
    "known_configs",
    "requires",
    "to_json",
]
