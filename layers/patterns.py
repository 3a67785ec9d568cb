"""The four patterns in which attention is used, by whether a query sees later tokens and whose tokens it sees.

Zhang et al. 2023, "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling". In a cross pattern all of the
source's tokens are visible, and causal means that no output depends on a later query, as inside of a decoder that
generates one token after another.

A mixer serves a pattern by its config's fields `causal` and `cross`, both bool. One without such a field states why in
`NOT_SERVED`, under the field's name.
"""

from __future__ import annotations

import enum

import chz

from recollect.configuration import UserError
from recollect.layers.mixer import MixerConfig


class Pattern(enum.Enum):
    """A pattern; its value is its name in messages and tables."""

    NONCAUSAL_SELF = "noncausal self"
    CAUSAL_SELF = "causal self"
    NONCAUSAL_CROSS = "noncausal cross"
    CAUSAL_CROSS = "causal cross"

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later query."""
        return self in (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS)

    @property
    def cross(self) -> bool:
        """Whether keys are the source's tokens."""
        return self in (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS)


def in_pattern(config: MixerConfig, pattern: Pattern) -> MixerConfig:
    """Returns the mixer in a pattern.

    Raises:
      UserError: it does not serve the pattern; the message states why.
    """
    fields = chz.chz_fields(config)
    values = {"cross": True} if pattern.cross else {"causal": pattern.causal, "cross": False}
    for name, plain in (("causal", True), ("cross", False)):
        if name not in fields and values.pop(name, plain) != plain:
            reason = config.NOT_SERVED.get(name, f"its config has no field {name}")
            raise UserError(f"{type(config).__name__} does not serve {pattern.value} attention: {reason}")
    return chz.replace(config, **values)
