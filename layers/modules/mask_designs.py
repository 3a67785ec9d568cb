"""Masks as configs: which keys a query sees, beside causal attention and its windows. `Attention(design=PrefixLM())`.

A design states its mask by the algebra of pallas_kernels/masks.py, over positions, token types and the further fields
of a context; documents and padding are the mixer's. Each layer has a design of its own; `OfHeads` makes heads differ.
A new one is a subclass with `mask`.
"""

from __future__ import annotations

import abc

import chz

from recollect.configuration import Config
from recollect.pallas_kernels.mask_expressions import PREFIX, Mask
from recollect.pallas_kernels.masks import Causal, KeyIs, QueryIs


@chz.chz(typecheck=True)
class MaskDesign(Config):
    """Base of the designs. Over ordinary tokens alone a design is causal, so that text streams; tokens that see later
    ones must be given to `extend` in one call with these."""

    @abc.abstractmethod
    def mask(self) -> Mask:
        """Returns which keys a query sees, within its document."""


@chz.chz(typecheck=True)
class PrefixLM(MaskDesign):
    """Tokens of a type, PREFIX if not stated otherwise, see each other; all tokens see those before them (Raffel et al.
    2020, section 3.2.1, "causal with prefix").

    Attributes:
      token_type: the type of the prefix's tokens.
    """

    token_type: int = PREFIX

    def mask(self) -> Mask:
        types = (self.token_type,)
        return Causal() | (QueryIs("token_types", types) & KeyIs("token_types", types))
