"""Softmax attention with learned positions, layer norm, gelu and biases as GPT-2.

Source: modeling_gpt2.py of transformers 5.24. Its linear maps are (in, out), as here; queries, keys and values are one.
"""

from __future__ import annotations

from typing import Any

from recollect.configuration import UserError
from recollect.export.huggingface.requirements import HuggingFaceConfig, require, require_defaults
from recollect.export.huggingface.tensors import PLAIN, TRANSPOSED, LayerTensors, Tensor
from recollect.layers import Attention
from recollect.layers.modules.mlp import GELU
from recollect.layers.modules.norms import LayerNorm
from recollect.layers.modules.positions import LearnedPositions
from recollect.models import LanguageModel, repeat

CLASSES = {"gpt2": "GPT2LMHeadModel"}


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json that describe `model`.

    Raises:
      UserError: the layout cannot express it; the field is named.
    """
    norm, mlp, positions = model.norm, model.mlp, model.positions
    require(type(norm) is LayerNorm, "model.norm", norm, "GPT-2 has LayerNorm")
    require(type(mlp) is GELU, "model.mlp", mlp, "GPT-2 has GELU")
    assert isinstance(norm, LayerNorm) and isinstance(mlp, GELU) and positions is not None
    require(norm.bias, "norm.bias", norm.bias, "GPT-2's norms have biases")
    require(mlp.bias, "mlp.bias", mlp.bias, "GPT-2's MLP has biases")
    first = model.mixers[0]
    for layer, mixer in enumerate(model.mixers):
        path = f"layer {layer}: "
        require(type(mixer) is Attention, f"{path}mixer", mixer, "GPT-2 has Attention")
        assert isinstance(mixer, Attention)
        require(mixer == first, f"{path}mixer", mixer, "all layers must be the same")
        require(mixer.bias, f"{path}bias", mixer.bias, "GPT-2's attention has biases")
        same = mixer.key_heads in (None, mixer.heads)
        require(same, f"{path}key_heads", mixer.key_heads, "GPT-2 has as many key heads as heads")
        wide = mixer.head_width(model.width) * mixer.heads == model.width
        require(wide, f"{path}head_dim", mixer.head_dim, "GPT-2 has width / heads")
        require_defaults(mixer, path + "Attention", {"heads", "key_heads", "head_dim", "bias"})
    assert isinstance(first, Attention)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu",
        "n_embd": model.width,
        "n_head": first.heads,
        "n_inner": mlp.inner(model.width),
        "n_layer": len(model.mixers),
        "n_positions": positions.maximum,
        "layer_norm_epsilon": norm.epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model that a config.json of GPT-2 describes.

    Raises:
      UserError: a value that this project does not have; "gelu_new", the published models' approximation, is one.
    """
    config.one_of("activation_function", "gelu_new", "gelu")
    for name, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        config.one_of(name, value, value)
    width, heads = config.whole("n_embd"), config.whole("n_head")
    if width % heads:
        raise UserError(f"{config.where}: n_head={heads} does not divide n_embd={width}")
    return LanguageModel(
        width=width,
        stages=repeat(Attention(heads=heads, bias=True), depth=config.whole("n_layer")),
        norm=LayerNorm(epsilon=config.number("layer_norm_epsilon", 1e-5)),
        mlp=GELU(hidden=config.whole("n_inner", 4 * width), bias=True),
        positions=LearnedPositions(maximum=config.whole("n_positions", 1024)),
        tied=config.flag("tie_word_embeddings", True),
    )


def tensors_of(model: LanguageModel, kind: str = "gpt2") -> list[Tensor]:
    """Returns the table of tensors of `model`."""
    table = LayerTensors(model, "transformer.h.{}.")
    table.add("transformer.wte.weight", "embedding")
    table.add("transformer.wpe.weight", "positions.table")
    for theirs, ours in (("ln_1", "mixer_norm"), ("ln_2", "mlp_norm")):
        table.add_layers(f"{theirs}.weight", f"{ours}.gain")
        table.add_layers(f"{theirs}.bias", f"{ours}.bias")
    fused = ("mixer.query", "mixer.key", "mixer.value")
    table.add_linear("attn.c_attn", *fused, bias=True, form=PLAIN)
    table.add_linear("attn.c_proj", "mixer.output", bias=True, form=PLAIN)
    table.add_linear("mlp.c_fc", "mlp.up", bias=True, form=PLAIN)
    table.add_linear("mlp.c_proj", "mlp.down", bias=True, form=PLAIN)
    table.add("transformer.ln_f.weight", "final_norm.gain")
    table.add("transformer.ln_f.bias", "final_norm.bias")
    if not model.tied:
        table.add("lm_head.weight", "head.kernel", TRANSPOSED)
    return table.tensors
