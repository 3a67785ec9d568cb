"""Masks of multimodal models: what a percept (a cell of a grid, a patch of an image) sees. In each of them text sees
all that is before it.

    Bidirectional      what is before it, and all of its grid (Croc)
    ModalityMutual     what is before it, and the questions' tokens, which may follow (AKI)
    Composite          text before it, and itself; no other percept (EE-MLLM)
    Concentric         text before it, and of its grid the rings up to its own, counted inwards (CCA)
    Parallel           what is before it, but no other grid

Percepts are tokens of type PERCEPT; the further fields that masks read are grid (from 1), ring and question (1 in one),
as data/synthetics/grid_questions.py gives them. CCA's positions, and those with which outputs do not depend on the
order of parallel grids, are a matter of the mixer (`PlannedAttention`).

Easy to get wrong: what a percept sees is a matter of fields, not of storage, so that keys stored later may be visible.
"""

from __future__ import annotations

import chz

from recollect.layers.modules.mask_designs import MaskDesign
from recollect.pallas_kernels.mask_expressions import PERCEPT, Mask
from recollect.pallas_kernels.masks import Causal, KeyIs, QueryIs, Same

_OF_PERCEPTS = QueryIs("token_types", (PERCEPT,))
_PERCEPTS = KeyIs("token_types", (PERCEPT,))


@chz.chz(typecheck=True)
class Bidirectional(MaskDesign):
    """The mixed mask of Croc (Xie et al., arXiv 2410.14332)."""

    def mask(self) -> Mask:
        return Causal() | (_OF_PERCEPTS & _PERCEPTS & Same("grid"))


@chz.chz(typecheck=True)
class ModalityMutual(MaskDesign):
    """Modality-mutual attention of AKI (Wang et al., arXiv 2503.02597). Answers must not be marked as question."""

    def mask(self) -> Mask:
        return Causal() | (_OF_PERCEPTS & KeyIs("question", (1,)))


@chz.chz(typecheck=True)
class Composite(MaskDesign):
    """Composite attention of EE-MLLM (Ma et al., arXiv 2408.11795), with percepts that see themselves."""

    def mask(self) -> Mask:
        return Causal() & (~(_OF_PERCEPTS & _PERCEPTS) | Same("positions"))


@chz.chz(typecheck=True)
class Concentric(MaskDesign):
    """The mask of concentric causal attention, CCA (Xing et al., arXiv 2410.15926)."""

    def mask(self) -> Mask:
        among = _OF_PERCEPTS & _PERCEPTS
        return (Causal() & ~among) | (among & Same("grid") & Causal("ring"))


@chz.chz(typecheck=True)
class Parallel(MaskDesign):
    """Segments that do not see one another, as parallel context windows (Ratner et al., arXiv 2212.10947)."""

    def mask(self) -> Mask:
        return Causal() & (~(_OF_PERCEPTS & _PERCEPTS) | Same("grid"))
