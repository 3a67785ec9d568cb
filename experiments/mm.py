"""Designs of multimodal masks on grids of percepts and questions about them, at a size for two CPU cores.

Setting of all experiments here: 16 cells, then 6 questions (34 tokens), width 32, 2 heads, 2 layers with MLPs of twice
the width, rotary positions, cells projected from continuous inputs that state their row and column. AdamW at 5e-3, one
cycle over 2,000 steps of 32 examples. What a cell sees is stated in layers/modules/percept_masks.py; docs/masks.md
has accuracies and FLOPs.
"""

from __future__ import annotations

from typing import Any

from recollect.data.synthetics import GridQuestions
from recollect.experiments.study import Study
from recollect.layers import (
    Attention,
    InjectedAttention,
    PlannedAttention,
    PositionInvariantAttention,
    SoftmaxConfig,
)
from recollect.layers.modules.mlp import GELU
from recollect.layers.modules.percept_masks import Bidirectional, Composite, Concentric, ModalityMutual, Parallel
from recollect.layers.modules.positions import Rotary
from recollect.models import LanguageModel, Projector, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW

GRID = GridQuestions(side=4, objects=6, shapes=8, colours=4, questions=6)
CANDIDATES = GridQuestions(side=2, grids=4, objects=2, shapes=8, colours=4, questions=6, kinds=("colour", "count"))

VARIANTS = {
    "causal": "One grid under causal attention.",
    "croc": "One grid, cells see all of it (Croc).",
    "aki": "One grid, cells see the questions behind it (AKI).",
    "ee_mllm": "One grid, cells see no other cell (EE-MLLM).",
    "saisa": "One grid that text alone reads, injected per layer (SAISA).",
    "cca": "One grid in concentric positions, cells see rings up to their own (CCA).",
    "candidates_causal": "Four grids whose order means nothing, under causal attention.",
    "candidates_parallel": "Four grids in the same positions that do not see one another.",
    "candidates_pine": "Four grids, each reader ranks them by importance (PINE).",
}
"""Name and docstring of the experiments, which experiments/registry.py reads without running this file."""


def mixers(inputs: int) -> dict[str, SoftmaxConfig]:
    """Returns the mixers of the experiments by name; `inputs` is the width of the cells' continuous inputs."""
    shared: dict[str, Any] = {"heads": 2, "positions": Rotary()}
    return {
        "causal": Attention(**shared),
        "croc": Attention(design=Bidirectional(), **shared),
        "aki": Attention(design=ModalityMutual(), **shared),
        "ee_mllm": Attention(design=Composite(), **shared),
        "saisa": InjectedAttention(inputs=inputs, **shared),
        "cca": PlannedAttention(plan="concentric", design=Concentric(), **shared),
        "candidates_causal": Attention(**shared),
        "candidates_parallel": PlannedAttention(plan="parallel", design=Parallel(), **shared),
        "candidates_pine": PositionInvariantAttention(segments=CANDIDATES.grids, **shared),
    }


def variant(name: str) -> Experiment:
    """Returns the experiment of a name in VARIANTS."""
    data = CANDIDATES if name.startswith("candidates") else GRID
    inputs = data.shapes + data.colours + 2 * data.side
    model = LanguageModel(
        width=32,
        stages=repeat(mixers(inputs)[name], depth=2),
        mlp=GELU(expansion=2),
        projector=Projector(channels=inputs),
    )
    run = Run(steps=2000, batch_size=32, steps_per_call=100, evaluate_every=1000, checkpoint_every=2000)
    return Experiment(name=f"mm.{name}", model=model, data=data, optimizer=AdamW(learning_rate=5e-3), run=run)


def designs() -> Study:
    """Every design on one grid, one learning rate and one seed.

    python main.py compare mm.designs
    """
    return Study(tuple(variant(name) for name in VARIANTS if not name.startswith("candidates")))


def candidates() -> Study:
    """Causal, parallel and position-invariant attention to four grids, one learning rate and one seed.

    python main.py compare mm.candidates
    """
    return Study(tuple(variant(name) for name in VARIANTS if name.startswith("candidates")))
