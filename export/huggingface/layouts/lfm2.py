"""Gated short convolutions and attention as LFM2 (modeling_lfm2.py of transformers 5.24)."""

from __future__ import annotations

from typing import Any

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig
from recollect.export.huggingface.tensors import TAPS, Form, Tensor
from recollect.layers import Attention, GatedConvolution
from recollect.layers.modules.mlp import SwiGLU
from recollect.models import LanguageModel

CLASSES = {"lfm2": "Lfm2ForCausalLM"}
HEAD_NORM_EPSILON = 1e-6
"""Of the norms of queries and keys here, which the layout gives the epsilon of all norms."""
TYPES: dict[type, str] = {GatedConvolution: "conv", Attention: "full_attention"}
NAMES = {"mixer_norm": "operator_norm", "mlp_norm": "ffn_norm", "gate": "feed_forward.w1", "up": "feed_forward.w3"}
NAMES |= {"down": "feed_forward.w2", "final": "model.embedding_norm", "embedding": "model.embed_tokens"}


def fits(model: LanguageModel) -> bool:
    """Returns whether the mixers are gated short convolutions and attention."""
    return shared.only(model, GatedConvolution, Attention)


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    fields = shared.decoder_fields(model, "lfm2", CLASSES["lfm2"])
    return {
        **fields,
        **shared.attention_fields(shared.first(model, Attention), model.width),
        "norm_eps": fields.pop("rms_norm_eps"),
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": shared.first(model, GatedConvolution).kernel,
        "layer_types": shared.layer_types(model, TYPES),
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    epsilon = config.number("norm_eps", 1e-5)
    if epsilon != HEAD_NORM_EPSILON:
        raise UserError(f"{config.where}: norm_eps={epsilon}: query and key norms have {HEAD_NORM_EPSILON} here")
    config.one_of("conv_bias", False, False)
    convolution = GatedConvolution(
        kernel=config.whole("conv_L_cache", 3), expansion=2, bias=False, activation="none", input_gate=True
    )
    attention = Attention(query_key_norm=True, **{**shared.attention_of(config, base=1e6), "bias": False})
    mixers = {"conv": convolution, "full_attention": attention}
    full = config.fields.get("full_attn_idxs")

    def default(layers: int) -> list[str]:
        listed = full if isinstance(full, list) else range(layers)
        return ["full_attention" if layer in listed else "conv" for layer in range(layers)]

    layers = shared.typed_layers(config, "layer_types", mixers, default)
    return shared.decoder(config, layers, epsilon="norm_eps", mlp=SwiGLU(hidden=_inner(config)), tied=_tied(config))


def _inner(config: HuggingFaceConfig) -> int:
    """Returns the hidden units of the MLPs, which the layout may round up."""
    inner = config.whole("block_ff_dim", config.whole("intermediate_size", 12288))
    if config.flag("block_auto_adjust_ff_dim", True):
        multiple = config.whole("block_multiple_of", 256)
        inner = int(config.number("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
        inner = -(-inner // multiple) * multiple
    return max(inner, 1)


def _tied(config: HuggingFaceConfig) -> bool:
    return config.flag("tie_embedding", config.flag("tie_word_embeddings", True))


def tensors_of(model: LanguageModel, kind: str = "lfm2") -> list[Tensor]:
    """Returns the table of tensors."""
    table = shared.decoder_tensors(model, NAMES)
    of, width = GatedConvolution, model.width
    # Theirs: what gates the input, what gates the output, the input. Ours: the reverse.
    thirds = Form(
        lambda kernel: kernel.reshape(width, 3, -1)[:, ::-1].reshape(width, -1).T,
        lambda weight: weight.T.reshape(width, 3, -1)[:, ::-1].reshape(width, -1),
    )
    table.add_linear("conv.in_proj", "mixer.input", of=of, form=thirds)
    table.add_layers("conv.conv.weight", "mixer.convolution.taps", of=of, form=TAPS)
    table.add_linear("conv.out_proj", "mixer.output", of=of)
    shared.attention_tensors(table, Attention, output="out_proj", norms=("q_layernorm", "k_layernorm"))
    return table.tensors
