"""The gguf package's half of the interoperability tests; it runs in the environment of `make test-interop`.

    python gguf_side.py FOLDER OUT       # exports a Hugging Face folder, and prints what is wrong with the result

The file is read back by `GGUFReader`: every tensor of the folder must be there, unchanged, under llama.cpp's name.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import load_file

from recollect.main import main

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NAMES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
NAMES |= {f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"} | {"self_attn.o_proj": "attn_output"}
NAMES |= {f"self_attn.{letter}_norm": f"attn_{letter}_norm" for letter in "qk"}
NAMES |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
}
FIELDS |= {"num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv"}
FIELDS |= {"head_dim": "attention.key_length", "rope_theta": "rope.freq_base", "vocab_size": "vocab_size"}
FIELDS |= {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}


def their_name(name: str) -> str:
    """Returns llama.cpp's name of a tensor of transformers."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
    if layer:
        return f"blk.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}"
    module, kind = name.rsplit(".", 1)
    return f"{NAMES[module]}.{kind}"


def check(folder: Path, out: Path) -> None:
    """Prints a line for whatever differs."""
    config = json.loads((folder / "config.json").read_text())
    reader = GGUFReader(out / "model.gguf")
    kind = reader.fields["general.architecture"].contents()
    if kind != config["model_type"]:
        print("architecture", kind)
    for ours, theirs in FIELDS.items():
        value = reader.fields[f"{kind}.{theirs}"].contents()
        if not np.isclose(value, config[ours]):
            print(theirs, value, config[ours])
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    if any(tokens[number] != token for token, number in vocabulary.items()) or len(tokens) != config["vocab_size"]:
        print("tokens")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = {their_name(name): array for name, array in load_file(folder / "model.safetensors").items()}
    if stored.keys() != expected.keys():
        print("names", sorted(stored.keys() ^ expected.keys()))
    for name, array in expected.items():
        found = stored[name]
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(
            name.split(".")[-2]
        )
        if kind == "llama" and heads:  # pairs of dimensions that are rotated together lie side by side there
            found = np.stack([part.reshape(heads, -1, 2, *part.shape[1:]) for part in [found]])[0]
            found = np.concatenate([found[:, :, 0], found[:, :, 1]], axis=1).reshape(array.shape)
        if found.shape != array.shape or not np.array_equal(found, array):
            print("tensor", name, found.shape, array.shape)


if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    if main(["export", str(folder), str(out), "--format", "gguf"]):
        print("export failed")
    check(folder, out)
