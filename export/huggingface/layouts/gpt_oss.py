"""Windows with learned sinks as gpt-oss of one expert (modeling_gpt_oss.py of transformers 5.24).

SwiGLU is its MLP with `swiglu_alpha` 1, a limit that nothing reaches, and biases; it adds 1 to the second factor, so
that bias is stored less 1. Factors alternate. Published models have alpha 1.702, many experts, and no windows in every
other layer, which `Attention` here, without sinks, cannot be.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig
from recollect.export.huggingface.tensors import Form, Tensor
from recollect.layers import SlidingWindow
from recollect.layers.modules.mlp import SwiGLU
from recollect.models import LanguageModel

CLASSES = {"gpt_oss": "GptOssForCausalLM"}
NO_LIMIT = 1e30
NAMES = {name: shared.LLAMA_NAMES[name] for name in ("mixer_norm", "mlp_norm", "final", "embedding")}


def fits(model: LanguageModel) -> bool:
    """Returns whether all mixers are windows with learned sinks."""
    return shared.only(model, SlidingWindow) and shared.first(model, SlidingWindow).sinks == "learned"


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    window = shared.first(model, SlidingWindow)
    return {
        **shared.decoder_fields(model, "gpt_oss", CLASSES["gpt_oss"]),
        **shared.attention_fields(window, model.width),
        "sliding_window": window.window,
        "layer_types": ["sliding_attention"] * len(model.mixers),
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "swiglu_alpha": 1.0,
        "swiglu_limit": NO_LIMIT,
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    config.one_of("num_local_experts", 128, 1)
    config.one_of("swiglu_alpha", 1.702, 1.0, 1)
    if config.number("swiglu_limit", 7.0) < 1e6:
        raise UserError(f"{config.where}: swiglu_limit: SwiGLU has no limit here; {NO_LIMIT} is none")
    fields = {**shared.attention_of(config, base=150_000.0, head_dim=64), "bias": config.flag("attention_bias", True)}
    window = SlidingWindow(window=config.whole("sliding_window", 128), sinks="learned", **fields)

    def default(layers: int) -> list[str]:
        return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]

    layers = shared.typed_layers(config, "layer_types", {"sliding_attention": window}, default)
    return shared.decoder(config, layers, mlp=SwiGLU(hidden=config.whole("intermediate_size"), bias=True))


def tensors_of(model: LanguageModel, kind: str = "gpt_oss") -> list[Tensor]:
    """Returns the table of tensors."""
    table = shared.decoder_tensors(model, NAMES)
    assert model.mlp is not None
    width, inner = model.width, model.mlp.inner(model.width)
    shared.attention_tensors(table, SlidingWindow)
    table.add_layers("self_attn.sinks", "mixer.sinks")
    table.add_constant("mlp.router.weight", (1, width))
    table.add_constant("mlp.router.bias", (1,))
    kernel = Form(lambda kernel: kernel[None], lambda weight: weight[0])
    # Every other number belongs to the factor that gains 1.
    odd = Form(lambda bias: (bias - _odd(inner))[None], lambda stored: stored[0] + _odd(inner))
    parts = ("mlp.gate", "mlp.up")
    table.add_layers("mlp.experts.gate_up_proj", *(f"{part}.kernel" for part in parts), form=kernel, groups=inner)
    table.add_layers("mlp.experts.gate_up_proj_bias", *(f"{part}.bias" for part in parts), form=odd, groups=inner)
    table.add_layers("mlp.experts.down_proj", "mlp.down.kernel", form=kernel)
    table.add_layers("mlp.experts.down_proj_bias", "mlp.down.bias", form=kernel)
    return table.tensors


def _odd(inner: int) -> np.ndarray:
    return np.tile(np.array([0, 1], np.float32), inner)
