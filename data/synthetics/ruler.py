"""RULER's tasks by their published names, and the passkey, in a closed vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recollect.configuration import UserError
from recollect.data.synthetics.needles import Needles
from recollect.data.synthetics.task import SyntheticTask
from recollect.data.synthetics.variable_tracking import VariableTracking
from recollect.data.synthetics.word_counts import CommonWords, FrequentWords

_HEX: dict[str, Any] = {"key_tokens": 7, "words": 16, "value_tokens": 7, "symbols": 16}
"""Stands for UUIDs, of which there are 16 ** 32: keys and values of 7 hexadecimal digits."""

RULER: dict[str, tuple[Callable[..., SyntheticTask], dict[str, Any]]] = {
    "passkey": (Needles, {"haystack": "cycle", "words": 1, "value_tokens": 5}),
    "niah_single_1": (Needles, {"haystack": "cycle"}),
    "niah_single_2": (Needles, {}),
    "niah_single_3": (Needles, {"symbols": 16}),
    "niah_multikey_1": (Needles, {"keys": 4}),
    "niah_multikey_2": (Needles, {"haystack": "needles"}),
    "niah_multikey_3": (Needles, {"haystack": "needles", **_HEX}),
    "niah_multivalue": (Needles, {"values": 4}),
    "niah_multiquery": (Needles, {"keys": 4, "queries": 4}),
    "vt": (VariableTracking, {}),
    "cwe": (CommonWords, {}),
    "fwe": (FrequentWords, {}),
}
"""Class and knobs of each; essays are random words here."""


def ruler(name: str, length: int = 128, **knobs: Any) -> SyntheticTask:
    """Returns a task of RULER by its published name, or "passkey", at a length in tokens; `knobs` replace its fields.

    Source: Hsieh et al. (arXiv 2404.06654), appendix B; the 11 tasks of 13 that need no natural text.

    Raises:
      UserError: there is no task of this name, or its needles don't fit the length.
    """
    if name not in RULER:
        raise UserError(f"name={name}: RULER has {', '.join(RULER)}")
    cls, fields = RULER[name]
    return cls(length=length, **{**fields, **knobs})
