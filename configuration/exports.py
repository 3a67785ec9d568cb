"""Public names of a package, derived from what its `__init__` imports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exported_names(namespace: Mapping[str, Any]) -> list[str]:
    """Returns the names of the classes and functions in a package's `globals()` that its own modules define:
    `__all__` of a package to which one import line adds a name."""
    modules = f"{namespace['__name__']}."
    names = (name for name, value in namespace.items() if getattr(value, "__module__", "").startswith(modules))
    return sorted(name for name in names if not name.startswith("_"))
