"""What the gguf package and llama.cpp make of exported files; it runs in the environment of `make test-interop`.

    python gguf_side.py ROOT       # each ROOT/NAME/hf, a Hugging Face folder, is exported to ROOT/NAME/gguf

The file is read back by `GGUFReader` and compared with the folder, whose names, sizes and arrays are put into those of
llama.cpp here: ROOT/NAME/wrong.txt has a line for each difference. Where xllamacpp is installed, llama.cpp generates:
ROOT/NAME/llama_cpp.npz has ASCII `tokens` (n,) after `prompt`, `log_probs` (n, 257) of all tokens there, and the `ids`
of `text`.
"""

import json
import re
import sys
import urllib.request
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import load_file

from recollect.main import main

try:
    import xllamacpp
except ImportError:
    xllamacpp = None

PROMPT, NEW = [256, *b"def f(x):\n  return x + "], 12
TEXT = "don't  naïve(x)\n\n  東京 🙂 1234"

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OUTER |= {"backbone.embeddings": "token_embd", "backbone.norm_f": "output_norm"}
SHARED = {"input_layernorm": "attn_norm", "norm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
SHARED |= {f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"} | {"self_attn.o_proj": "attn_output"}
SHARED |= {f"self_attn.{letter}_norm": f"attn_{letter}_norm" for letter in "qk"}
SHARED |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
LINEAR = {"in_proj_qkv": "attn_qkv", "in_proj_z": "attn_gate", "in_proj_a": "ssm_alpha", "in_proj_b": "ssm_beta"}
LINEAR |= {
    "conv1d": "ssm_conv1d",
    "A_log": "ssm_a",
    "dt_bias": "ssm_dt.bias",
    "norm": "ssm_norm",
    "out_proj": "ssm_out",
}
KIMI = {f"{letter}_conv1d": f"ssm_conv1d_{letter}" for letter in "qkv"} | {"A_log": "ssm_a", "dt_bias": "ssm_dt.bias"}
KIMI |= {f"{letter}_{part}_proj": f"ssm_{letter}_{part}" for letter in "fg" for part in "ab"} | {"b_proj": "ssm_beta"}
KIMI |= {"o_norm": "ssm_norm", "kv_a_proj_with_mqa": "attn_kv_a_mqa", "kv_a_layernorm": "attn_kv_a_norm"}
MAMBA = {"in_proj": "ssm_in", "x_proj": "ssm_x", "dt_proj": "ssm_dt", "D": "ssm_d"} | LINEAR
NAMES = {"qwen35": SHARED | {f"linear_attn.{name}": theirs for name, theirs in LINEAR.items()}}
NAMES["qwen35"]["post_attention_layernorm"] = "post_attention_norm"
NAMES["kimi-linear"] = SHARED | {f"self_attn.{name}": theirs for name, theirs in KIMI.items()}
NAMES |= dict.fromkeys(("mamba", "mamba2"), SHARED | {f"mixer.{name}": theirs for name, theirs in MAMBA.items()})
NAMES |= dict.fromkeys(("llama", "qwen3"), SHARED)
ARCHITECTURES = {"qwen3_5_text": "qwen35", "kimi_linear": "kimi-linear"}

DECODER = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count", "vocab_size": "vocab_size"}
DECODER |= {"intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count"}
DECODER |= {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
ATTENTION = {"num_key_value_heads": "attention.head_count_kv", "rope_theta": "rope.freq_base"}
ATTENTION |= {"head_dim": "attention.key_length"} | DECODER
OF_MAMBA = {"hidden_size": "embedding_length", "layer_norm_epsilon": "attention.layer_norm_rms_epsilon"}
OF_MAMBA |= {"conv_kernel": "ssm.conv_kernel", "state_size": "ssm.state_size", "num_hidden_layers": "block_count"}
FIELDS = {"llama": ATTENTION, "qwen3": ATTENTION, "qwen35": ATTENTION | {"linear_key_head_dim": "ssm.state_size"}}
FIELDS["qwen35"] |= {"linear_num_value_heads": "ssm.time_step_rank", "linear_num_key_heads": "ssm.group_count"}
FIELDS["kimi-linear"] = DECODER | {"kv_lora_rank": "attention.kv_lora_rank", "linear_head_dim": "kda.head_dim"}
FIELDS["kimi-linear"] |= {"v_head_dim": "attention.value_length_mla", "num_hidden_layers": "leading_dense_block_count"}
FIELDS["mamba"] = OF_MAMBA | {"time_step_rank": "ssm.time_step_rank", "intermediate_size": "ssm.inner_size"}
FIELDS["mamba2"] = OF_MAMBA | {"num_heads": "ssm.time_step_rank", "n_groups": "ssm.group_count"}


def theirs(name, array, kind, config):
    """Yields name and array of what llama.cpp has for a tensor of transformers."""
    layer = re.fullmatch(r"(?:model|backbone)\.layers\.(\d+)\.(.*?)(\.weight|\.bias)?", name)
    if not layer:
        module, suffix = name.rsplit(".", 1)
        centred = kind == "qwen35" and module == "model.norm"
        yield f"{OUTER[module]}.{suffix}", array + centred
        return
    block, module, suffix = f"blk.{layer[1]}.", layer[2], layer[3] or ""
    part = module.split(".")[-1]
    if part == "kv_b_proj":
        heads, keys, values = (config[name] for name in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
        rows = [array[head * (keys + values) : (head + 1) * (keys + values)] for head in range(heads)]
        yield f"{block}attn_k_b.weight", np.stack([both[:keys].T for both in rows])
        yield f"{block}attn_v_b.weight", np.stack([both[keys:] for both in rows])
        return
    if kind == "llama" and part in ("q_proj", "k_proj"):  # dimensions i and i + d / 2, rotated together, side by side
        dim = config["head_dim"]
        order = [i // 2 + (i % 2) * (dim // 2) for i in range(dim)]
        array = array.reshape(-1, dim, *array.shape[1:])[:, order].reshape(array.shape)
    if part == "A_log":
        array = -np.exp(array)
    if part.endswith("conv1d") and suffix == ".weight":
        array = array[None] if kind == "kimi-linear" else array[:, 0]
    if kind == "qwen35" and part.endswith("norm") and "linear_attn" not in module:
        array = array + 1
    if kind == "qwen35" and "linear_attn" in module and part != "norm":
        keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
        order = [key * (heads // keys) + turn for turn in range(heads // keys) for key in range(keys)]
        first = 2 * keys * config["linear_key_head_dim"] if part in ("in_proj_qkv", "conv1d") else 0
        array = array.T if part == "out_proj" else array
        values = array[first:].reshape(heads, -1, *array.shape[1:])[order].reshape(array[first:].shape)
        array = np.concatenate([array[:first], values])
        array = array.T if part == "out_proj" else array
    if kind == "mamba2" and part in ("A_log", "D"):
        array = array.reshape(-1, 1)
    if kind == "mamba2" and module == "mixer.norm":
        array = array.reshape(config["n_groups"], -1)
    yield block + NAMES[kind][module] + suffix, array


def wrong(folder, file):
    """Yields a line for whatever differs."""
    config = json.loads((folder / "config.json").read_text())
    reader = GGUFReader(file)
    kind = ARCHITECTURES.get(config["model_type"], config["model_type"])
    if reader.fields["general.architecture"].contents() != kind:
        yield f"architecture {reader.fields['general.architecture'].contents()}"
    for ours, key in FIELDS[kind].items():
        value = reader.fields[f"{kind}.{key}"].contents()
        if not np.isclose(value, config[ours]):
            yield f"{key} {value} {config[ours]}"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    if any(tokens[number] != token for token, number in vocabulary.items()) or len(tokens) != config["vocab_size"]:
        yield "tokens"
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    read = load_file(folder / "model.safetensors").items()
    expected = {name: array for ours, values in read for name, array in theirs(ours, values, kind, config)}
    if stored.keys() != expected.keys():
        yield f"names {sorted(stored.keys() ^ expected.keys())}"
    for name in stored.keys() & expected.keys():
        found, array = stored[name], expected[name]
        if found.shape != array.shape or not np.allclose(found, array, rtol=1e-6, atol=0):
            yield f"tensor {name} {found.shape} {array.shape}"


def generated(file):
    """Returns what llama.cpp generates greedily after a prompt, how likely each token was, and the ids of a text."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup, settings.n_parallel = str(file), 64, False, 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    asked = {"prompt": PROMPT, "n_predict": NEW, "temperature": 0, "n_probs": 257, "cache_prompt": False}
    # ASCII alone: llama.cpp leaves out steps that end within a character.
    asked["logit_bias"] = [[token, False] for token in range(128, 257)]
    steps = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    log_probs = np.full((len(steps), 257), np.nan, np.float32)
    for row, step in zip(log_probs, steps, strict=True):
        for token in step["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    body = json.dumps({"content": TEXT, "add_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        ids = json.load(answer)["tokens"]
    tokens = np.array([step["id"] for step in steps])
    return {"prompt": PROMPT, "tokens": tokens, "log_probs": log_probs, "text": TEXT, "ids": np.array(ids)}


if __name__ == "__main__":
    for root in sorted(Path(sys.argv[1]).iterdir()):
        failed = main(["export", str(root / "hf"), str(root / "gguf"), "--format", "gguf"])
        file = root / "gguf" / "model.gguf"
        (root / "wrong.txt").write_text("export failed" if failed else "\n".join(wrong(root / "hf", file)))
        if xllamacpp is not None and not failed:
            np.savez(root / "llama_cpp.npz", **generated(file))
