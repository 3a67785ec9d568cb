"""RG-LRU and windows as RecurrentGemma (modeling_recurrent_gemma.py of transformers 5.24).

It multiplies embeddings by the root of the width (in bf16), so its head is not the same numbers. Its cap on logits is
written so large that it changes nothing, and is not read where it would.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig, require
from recollect.export.huggingface.tensors import CENTRED, TAPS, Form, Tensor, shaped
from recollect.layers import RGLRU, SlidingWindow
from recollect.layers.modules.mlp import GeGLU
from recollect.models import LanguageModel

CLASSES = {"recurrent_gemma": "RecurrentGemmaForCausalLM"}
NO_CAP = 1e6
"""tanh(x / cap) cap is x to fp32's precision from here on."""
NAMES = {"mixer_norm": "temporal_pre_norm", "mlp_norm": "channel_pre_norm", "gate": "mlp_block.gate_proj"}
NAMES |= {"up": "mlp_block.up_proj", "down": "mlp_block.down_proj"}
NAMES |= {"final": "model.final_norm", "embedding": "model.embed_tokens"}


def fits(model: LanguageModel) -> bool:
    """Returns whether the mixers are RG-LRU's and windows."""
    return shared.only(model, RGLRU, SlidingWindow)


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    linear, window = shared.first(model, RGLRU), shared.first(model, SlidingWindow)
    fields = shared.decoder_fields(model, "recurrent_gemma", CLASSES["recurrent_gemma"])
    del fields["hidden_act"]
    if SlidingWindow in map(type, model.mixers):
        fields |= shared.attention_fields(window, model.width)
        whole = fields["head_dim"] * window.heads == model.width
        require(whole, "head_dim", window.head_dim, "RecurrentGemma has width / heads")
    return {
        **fields,
        "num_attention_heads": linear.heads,
        "intermediate_size": 2 * fields["intermediate_size"],
        "hidden_activation": "gelu_pytorch_tanh",
        "lru_width": linear.channels or model.width,
        "conv1d_width": linear.kernel,
        "attention_window_size": window.window,
        "logits_soft_cap": NO_CAP,
        "block_types": ["recurrent" if type(mixer) is RGLRU else "attention" for mixer in model.mixers],
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    cap = config.number("logits_soft_cap", 30.0)
    if cap < NO_CAP:
        raise UserError(f"{config.where}: logits_soft_cap={cap}: logits are not capped here ({NO_CAP:.0f} is no cap)")
    config.one_of("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    config.one_of("tie_word_embeddings", True, False)
    inner = config.whole("intermediate_size", 3 * 2560)
    linear = RGLRU(
        heads=config.whole("num_attention_heads", 10),
        channels=config.whole("lru_width", config.whole("hidden_size")),
        kernel=config.whole("conv1d_width", 4),
    )
    window = SlidingWindow(
        window=config.whole("attention_window_size", 2048),
        **shared.attention_of(config, fraction=0.5),
    )
    mixers = {"recurrent": linear, "attention": window}
    types = config.fields.get("block_types") or ["recurrent", "recurrent", "attention"]
    layers = config.whole("num_hidden_layers", 26)
    if "attention" in types:
        config.one_of("attention_bias", False, True)  # that of the output is always there
    if isinstance(types, list) and len(types) < layers:
        config = HuggingFaceConfig({**config.fields, "block_types": (types * layers)[:layers]}, config.where)
    mlp = GeGLU(hidden=max(inner // 2, 1), bias=True)
    return shared.decoder(config, shared.typed_layers(config, "block_types", mixers, None), mlp=mlp)


def tensors_of(model: LanguageModel, kind: str = "recurrent_gemma") -> list[Tensor]:
    """Returns the table of tensors."""
    scale = float(ml_dtypes.bfloat16(model.width**0.5))
    embedding = Form(lambda table: table / scale, lambda table: table * scale)
    table = shared.decoder_tensors(model, NAMES, gain=CENTRED, embedding=embedding)
    linear = shared.first(model, RGLRU)
    channels, of = linear.channels or model.width, RGLRU
    for theirs, ours in (("x", "input"), ("y", "gate"), ("out", "output")):
        table.add_linear(f"temporal_block.linear_{theirs}", f"mixer.{ours}", of=of, bias=True)
    table.add_layers("temporal_block.conv_1d.weight", "mixer.convolution.taps", of=of, form=TAPS)
    table.add_layers("temporal_block.conv_1d.bias", "mixer.convolution.bias", of=of)
    table.add_layers("temporal_block.rg_lru.recurrent_param", "mixer.rate", of=of)
    bias = shaped((channels,), (linear.heads, channels // linear.heads))
    for theirs, ours in (("input", "input"), ("recurrent", "recurrence")):
        table.add_layers(f"temporal_block.rg_lru.{theirs}_gate_weight", f"mixer.gates.{ours}.kernel", of=of)
        table.add_layers(f"temporal_block.rg_lru.{theirs}_gate_bias", f"mixer.gates.{ours}.bias", of=of, form=bias)
    shared.attention_tensors(table, SlidingWindow, module="temporal_block")
    return table.tensors
