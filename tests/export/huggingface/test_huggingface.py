"""Hugging Face folders without transformers: names and shapes as published, back again, and what is refused. With it:
tests/interop."""

import ast
import dataclasses
import json
import pickle

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recollect.configuration import UserError
from recollect.data.tokenizers import ByteTokenizer, open_tokenizer
from recollect.export.huggingface import Facts, export_huggingface, import_huggingface
from recollect.layers import Attention, KimiDeltaAttention, Landmark, LinearAttention, Mamba, SlidingWindow
from recollect.layers.modules import GELU, LayerNorm, LearnedPositions, Rotary, SwiGLU
from recollect.models import Autoencoder, Canon, FunctionalModel, LanguageModel, repeat
from tests.export.huggingface.cases import CODE, FLASH, MODELS, NORMED, parameters

FACTS = Facts("toy", step=7, batch_tokens=64, source="texts", digest="ab" * 32, results={"bits_per_byte": 2.5})


def export(name, folder, **settings):
    settings = {"facts": FACTS, "tokenizer": ByteTokenizer()} | settings
    config = (MODELS | FLASH)[name]
    return export_huggingface(parameters(config), config, folder, **settings)


def test_names_and_shapes_are_llamas(tmp_path):
    export("llama, biases, grouped, untied, head_dim", tmp_path / "out")
    shapes = {name: array.shape for name, array in load_file(tmp_path / "out" / "model.safetensors").items()}
    layer = {
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
        **{f"self_attn.{x}_proj.{kind}": (64, 32)[: 2 - (kind == "bias")] for x in "q" for kind in ("weight", "bias")},
        **{f"self_attn.{x}_proj.{kind}": (32, 32)[: 2 - (kind == "bias")] for x in "kv" for kind in ("weight", "bias")},
        "self_attn.o_proj.weight": (32, 64),
        "self_attn.o_proj.bias": (32,),
        "mlp.gate_proj.weight": (48, 32),
        "mlp.gate_proj.bias": (48,),
        "mlp.up_proj.weight": (48, 32),
        "mlp.up_proj.bias": (48,),
        "mlp.down_proj.weight": (32, 48),
        "mlp.down_proj.bias": (32,),
    }
    expected = {"model.embed_tokens.weight": (257, 32), "model.norm.weight": (32,), "lm_head.weight": (257, 32)}
    expected |= {f"model.layers.{number}.{name}": shape for number in (0, 1) for name, shape in layer.items()}
    assert shapes == expected
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}


def test_fused_tensors_of_phi3_and_gpt2(tmp_path):
    export("phi3, windows, grouped", tmp_path / "phi3")
    export("gpt2", tmp_path / "gpt2")
    phi3, gpt2 = (load_file(tmp_path / name / "model.safetensors") for name in ("phi3", "gpt2"))
    assert phi3["model.layers.1.self_attn.qkv_proj.weight"].shape == (32 + 16 + 16, 32)
    assert phi3["model.layers.0.mlp.gate_up_proj.weight"].shape == (96, 32)
    assert gpt2["transformer.h.1.attn.c_attn.weight"].shape == (32, 96), "(in, out), as GPT-2 has it"
    assert gpt2["transformer.wpe.weight"].shape == (64, 32) and "lm_head.weight" not in gpt2


@pytest.mark.parametrize("name", [*MODELS, *FLASH])
def test_back_again(name, tmp_path):
    export(name, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    params, config, tokenizer = import_huggingface(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == name.split(",")[0]
    export_huggingface(params, config, tmp_path / "again", facts=FACTS, tokenizer=tokenizer)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    text = "naïve\n東京 🙂 <|endoftext|>"
    assert tokenizer.encode(text).tolist() == ByteTokenizer().encode(text).tolist()
    if name == "qwen3, windows in some layers, biases":
        tokens = jnp.arange(40)[None]
        logits = [
            jax.jit(lambda of, tokens, model=model: FunctionalModel(model, 257).bind(of)(tokens))(of, tokens)
            for model, of in ((MODELS[name], parameters(MODELS[name])), (config, params))
        ]
        np.testing.assert_allclose(*logits, atol=1e-5)


def test_a_model_as_code_is_one_file_and_comes_back_without_it(tmp_path):
    config = CODE["code, based"]
    export_huggingface(parameters(config), config, tmp_path / "out", facts=FACTS, as_code=True)
    code = (tmp_path / "out" / "modeling_recollect.py").read_text()
    names = [getattr(node, "name", "") for node in ast.parse(code).body]
    assert {"LinearAttention", "SlidingWindow", "GatedConvolution", "RecollectForCausalLM"} <= set(names)
    assert "from parts" not in code
    assert not {"KimiDeltaAttention", "Hyena", "CanonBlock", "LandmarkForCausalLM"} & set(names), "what it needs alone"
    (tmp_path / "out" / "modeling_recollect.py").write_text("raise SystemExit('imported')")
    params, back, _ = import_huggingface(tmp_path / "out")
    assert back == config
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, parameters(config))))


@pytest.mark.parametrize(
    ("mixer", "reason"),
    [
        (Mamba(), "layer 0: mixer=Mamba"),
        (KimiDeltaAttention(bound=5.0), "KimiDeltaAttention.bound=5.0"),
        (Landmark(retrieve=2, window=2), "layer 0: Landmark.window=2"),
        (Landmark(predicted=True), "layer 0: Landmark.predicted=True"),
    ],
)
def test_what_the_pytorch_library_lacks_is_refused(mixer, reason, tmp_path):
    with pytest.raises(UserError, match=f"{reason} stands in the way"):
        export_huggingface(
            {"embedding": np.zeros((257, 32))}, model(mixer), tmp_path / "out", facts=FACTS, as_code=True
        )


def test_bytes_are_deterministic_and_weights_are_split(tmp_path):
    names = export("llama", tmp_path / "one", shard_bytes=20_000)
    assert names == export("llama", tmp_path / "two", shard_bytes=20_000)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    shards = [name for name in names if name.startswith("model-")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    export("llama", tmp_path / "whole")
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    assert max(sum(a.nbytes for a in load_file(tmp_path / "one" / name).values()) for name in shards[1:]) <= 20_000
    split, _, _ = import_huggingface(tmp_path / "one")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, split, parameters(MODELS["llama"]))))


def test_the_model_card_and_the_tokenizer_say_what_it_is(tmp_path):
    measured = {"results": {"bits_per_byte": 2.5, "loss": 1.7}, "intervals": {"bits_per_byte": [2.25, 2.75]}}
    export("llama", tmp_path / "out", facts=dataclasses.replace(FACTS, license="mit", measured_on="texts", **measured))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit\n" in card and "7 steps of 64 tokens" in card and "Measured on texts." in card
    assert "| bits_per_byte | 2.5 | 2.25 to 2.75 |\n| loss | 1.7 | - |" in card
    assert "`texts`" in card and "abab" in card
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 256
    assert open_tokenizer(str(tmp_path / "out")).encode("ab").tolist() == [256, 97, 98]
    export("llama", tmp_path / "recall", tokenizer=None)
    assert not (tmp_path / "recall" / "tokenizer.json").exists()


def model(*mixers, **fields):
    return LanguageModel(**{"width": 32, "mlp": SwiGLU(hidden=48), "stages": repeat(*mixers, depth=2)} | fields)


ROTARY = {"heads": 4, "positions": Rotary()}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (model(LinearAttention(heads=4)), "layer 0: mixer=LinearAttention"),
        (model(Attention(heads=4)), "layer 0: positions=None"),
        (model(Attention(**ROTARY), norm=LayerNorm()), "model.norm=LayerNorm"),
        (model(Attention(**ROTARY), mlp=GELU()), "model.mlp=GELU"),
        (model(Attention(**ROTARY), mlp=None), "model.mlp=None"),
        (model(Attention(**ROTARY), Attention(heads=2, positions=Rotary())), "layer 1: heads=2"),
        (model(Attention(**ROTARY), SlidingWindow(**ROTARY)), r"model.stages=\[None, 64\]"),
        (model(SlidingWindow(sinks="learned", **ROTARY)), "mlp.bias=False"),
        (model(SlidingWindow(window=4, **NORMED), SlidingWindow(window=5, **NORMED)), r"window=\[4, 5\]"),
        (model(Attention(heads=4, positions=Rotary(layout="interleaved"))), "layer 0: layout=interleaved"),
        (model(Attention(**NORMED), norm=chz.replace(MODELS["llama"].norm, epsilon=1e-5)), "norm.epsilon=1e-05"),
        (model(Attention(heads=4, positions=Rotary(fraction=0.5), bias=True)), "bias=True"),
        (chz.replace(MODELS["gpt2"], mlp=GELU()), "mlp.bias=False"),
        (model(Attention(**ROTARY), positions=LearnedPositions()), "model.norm=RMSNorm"),
        (model(Attention(**ROTARY), canon=Canon()), "model.canon=Canon"),
    ],
)
def test_what_no_layout_expresses_is_refused_by_its_field(config, reason, tmp_path):
    params = {"embedding": np.zeros((257, 32), np.float32)}
    with pytest.raises(UserError, match=f"^{reason}.* ?stands in the way of a Hugging Face export") as refused:
        export_huggingface(params, config, tmp_path / "out", facts=FACTS)
    assert str(refused.value).endswith("; --code (as_code=True) exports it, as PyTorch code")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^model=Autoencoder stands in the way"):
        export_huggingface({}, Autoencoder(stages=repeat(Attention(), depth=1)), tmp_path / "out", facts=FACTS)


@pytest.fixture
def folder(tmp_path):
    export("llama", tmp_path / "out")
    return tmp_path / "out"


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "bert"}, "model_type='bert' cannot be imported; llama, qwen3"),
        ({"model_type": ["llama"]}, "cannot be imported"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code to run"),
        ({"quantization_config": {}}, "quantised weights"),
        ({"hidden_act": "relu"}, "hidden_act='relu': this project has 'silu' only"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions of type 'default' only"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000: must be a whole number"),
        ({"hidden_size": 2**30}, "model.embed_tokens.weight is .257, 32.; its config.json asks for .257, 1073741824."),
        ({"num_hidden_layers": 10**9}, "asks for 1,000,000,000 layers, and there are 20 tensors"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight has no place"),
        ({"num_hidden_layers": 3}, "there is no tensor model.layers.2"),
        ({"num_attention_heads": True}, "num_attention_heads=True: must be a whole number"),
        ({"num_key_value_heads": 3}, "key_heads=3: must divide heads=4"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small': must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be a positive number"),
        ({"attention_bias": 1}, "attention_bias=1: must be true or false"),
        ({"tie_word_embeddings": False}, "there is no tensor lm_head.weight"),
        ({"vocab_size": 300}, "asks for .300, 32."),
    ],
)
def test_a_config_that_does_not_fit(folder, fields, reason):
    change(folder, **fields)
    with pytest.raises(UserError, match=reason) as refused:
        import_huggingface(folder)
    assert "\n" not in str(refused.value)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_weights_that_cannot_be_read(folder):
    path = folder / "model.safetensors"
    whole, arrays = path.read_bytes(), load_file(path)

    def refused(reason):
        with pytest.raises(UserError, match=reason):
            import_huggingface(folder)

    for damaged in (
        b"",
        whole[:100],
        whole[:-1],
        b"\xff" * 8 + whole[8:],
        whole + b"\0",
        whole.replace(b"F32", b"F99", 1),
    ):
        path.write_bytes(damaged)
        refused("is not a safetensors file that can be read")
    save_file({**arrays, "model.norm.weight": np.zeros(32, np.int32)}, path)
    refused("model.norm.weight has dtype I32")
    path.unlink()
    refused("there is no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused("pytorch_model.bin is a pickle, which is never loaded")
    index = folder / "model.safetensors.index.json"
    for name in ("../out/model.safetensors", "/etc/passwd", "model.bin", "sub/model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused("is not the name of a safetensors file in this folder")
    for content in ("[]", "{}", '{"weight_map": {"a": 1}}', "{"):
        index.write_text(content)
        refused("index.json")


def test_a_tokenizer_larger_than_the_model(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"vocab": {', '"vocab": {"zz": 300,', 1))
    with pytest.raises(UserError, match=r"tokenizer.json: has 301 tokens; the model has 257"):
        import_huggingface(folder)
