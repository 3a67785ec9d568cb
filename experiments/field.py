"""Recall with the mixers that the field compares, at the fixed setting of mqar.py: vocabulary 256, length 64, 8 pairs,
width 64, a convolution of width 3 first, 1,900 steps.

Each has 2 heads of 32 dimensions, as far as its published form lets it, and its published initial values. One learning
rate for all would rank recurrences by how well it suits them: the study tries two.
"""

from __future__ import annotations

from recollect.experiments import mqar
from recollect.experiments.study import Study, grid
from recollect.layers import (
    H3,
    HGRN2,
    MLSTM,
    RGLRU,
    RWKV6,
    RWKV7,
    S4D,
    Attention,
    BlockSelection,
    Comba,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedDeltaNet2,
    GatedLinearAttention,
    GatedSlotAttention,
    Hyena2,
    KimiDeltaAttention,
    Lightning,
    LinearAttention,
    LogLinearGatedDeltaNet,
    LogLinearMamba2,
    Mamba,
    Mamba2,
    Mamba3,
    MesaNet,
    NativeSparseAttention,
    Retention,
    SelectiveAttention,
    SparseLatentAttention,
    Titans,
    TTTLinear,
)
from recollect.layers.mixer import MixerConfig
from recollect.layers.modules import MeanBlocks
from recollect.training.experiment import Experiment

VARIANTS = {
    "attention": "Convolution + softmax attention, to compare with.",
    "moba": "Convolution + attention to the query's block of 8 and the 3 whose mean key fits best (MoBA).",
    "nsa": "Convolution + native sparse attention: compressed and selected blocks of 8, a window of 16, gates.",
    "dsa": "Convolution + latent attention to the 16 tokens that a lightning indexer picks (DSA).",
    "selective": "Convolution + attention whose outputs count where a learned gate says so (Zoology).",
    "based": "Convolution + linear attention with Taylor features (Based).",
    "retention": "Convolution + retention (RetNet): constant decays.",
    "lightning": "Convolution + lightning attention (MiniMax-01): constant decays by layer.",
    "transnormer": "Convolution + lightning attention as in TransNormerLLM.",
    "gla": "Convolution + gated linear attention: a decay per channel.",
    "hgrn2": "Convolution + HGRN2: forget gates that are keys.",
    "mlstm": "Convolution + mLSTM (xLSTM): exponential input gates.",
    "mamba2": "Convolution + Mamba-2: a decay per head, steps that write.",
    "delta_net": "Convolution + DeltaNet: the delta rule.",
    "gated_delta_net": "Convolution + Gated DeltaNet: the delta rule and a decay per head.",
    "kimi_delta_attention": "Convolution + Kimi Delta Attention: the delta rule and a decay per channel.",
    "gated_delta_net_2": "Convolution + Gated DeltaNet 2: strengths of erasing and writing per channel.",
    "comba": "Convolution + Comba: erases by the undecayed state.",
    "delta_product": "Convolution + DeltaProduct: two steps of the delta rule per token.",
    "log_linear_mamba2": "Convolution + log-linear Mamba-2: a state per power of two of the past.",
    "log_linear_gated_delta_net": "Convolution + log-linear Gated DeltaNet.",
    "mesa_net": "Convolution + MesaNet: the best fit of values to keys, 30 steps of conjugate gradients.",
    "ttt_linear": "Convolution + TTT-Linear: a map that learns while it reads.",
    "titans": "Convolution + Titans' linear memory: the same with momentum and forgetting.",
    "rwkv6": "Convolution + RWKV-6: a decay per channel, token shift by content.",
    "rwkv7": "Convolution + RWKV-7.",
    "gsa": "Convolution + gated slot attention: softmax over slots.",
    "rg_lru": "Convolution + Griffin's recurrent block: a vector for a state.",
    "mamba": "Convolution + Mamba: a selective state space model per channel.",
    "mamba3": "Convolution + Mamba-3: the trapezoidal rule, states that turn.",
    "s4d": "Convolution + S4D: a state space model per channel; mixes by place, not by content.",
    "h3": "Convolution + H3: shifted keys times values into a state space model.",
    "hyena2": "Convolution + Hyena-2's long convolution (LI).",
}
"""Name and docstring of the experiments, which experiments/registry.py reads without running this file."""

MIXERS: dict[str, MixerConfig] = {
    "attention": Attention(),
    "moba": BlockSelection(heads=2, retrieve=MeanBlocks(block=8, top=4)),
    "nsa": NativeSparseAttention(),
    "dsa": SparseLatentAttention(rotary_dim=0, rank=32),
    "selective": SelectiveAttention(),
    "based": LinearAttention(feature_dim=8),
    "retention": Retention(heads=2, value_dim=32),
    "lightning": Lightning(heads=2),
    "transnormer": Lightning(heads=2, form="transnormer"),
    "gla": GatedLinearAttention(heads=2, key_dim=32, kernel=4),
    "hgrn2": HGRN2(kernel=4),
    "mlstm": MLSTM(heads=2, key_dim=32),
    "mamba2": Mamba2(key_dim=32),
    "delta_net": DeltaNet(),
    "gated_delta_net": GatedDeltaNet(),
    "kimi_delta_attention": KimiDeltaAttention(),
    "gated_delta_net_2": GatedDeltaNet2(),
    "comba": Comba(),
    "delta_product": DeltaProduct(),
    "log_linear_mamba2": LogLinearMamba2(key_dim=32, levels=7),
    "log_linear_gated_delta_net": LogLinearGatedDeltaNet(levels=7),
    "mesa_net": MesaNet(),
    "ttt_linear": TTTLinear(),
    "titans": Titans(),
    "rwkv6": RWKV6(),
    "rwkv7": RWKV7(),
    "gsa": GatedSlotAttention(heads=2, kernel=4),
    "rg_lru": RGLRU(),
    "mamba": Mamba(),
    "mamba3": Mamba3(key_dim=32),
    "s4d": S4D(state=32),
    "h3": H3(head_dim=8, state=4, taps=4),
    "hyena2": Hyena2(),
}


def variant(name: str) -> Experiment:
    """Returns the experiment of a name in VARIANTS."""
    return mqar.recall(f"field.{name}", MIXERS[name])


def recall() -> Study:
    """Every mixer of the field at two learning rates, one seed (about an hour on two cores).

    python main.py compare field.recall
    """
    return Study(
        experiments=tuple(map(variant, VARIANTS)),
        sweep=grid({"optimizer.learning_rate": (3e-3, 1e-2)}),
        template=mqar.recall,
    )
