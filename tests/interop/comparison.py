"""Models here beside the same models in the transformers library.

python -m tests.interop.comparison               # prints the table of docs/interoperability.md
python -m tests.interop.comparison code          # its rows of models whose names begin so
python -m tests.interop.comparison --programs    # that of StableHLO, without transformers
python -m tests.interop.comparison --gguf        # that of GGUF, by llama.cpp
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.data.tokenizers import ByteTokenizer
from recollect.export.huggingface import Facts, export_huggingface, import_huggingface
from recollect.layers import Context
from recollect.models import FunctionalModel
from tests.export.huggingface.cases import CODE, MODELS, parameters

PROJECT = Path(__file__).parents[2]
PYTHON = PROJECT / ".venv-interop" / "bin" / "python"
"""Of the environment that `make test-interop` sets up."""

SIZES = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
SIZES |= NO_TOKENS
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
EXPORTED = MODELS | CODE
THEIRS = {
    "llama": {**SIZES, "model_type": "llama", "rope_parameters": ROPE, "attention_bias": True, "mlp_bias": True},
    "qwen3": {
        **SIZES,
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "mistral": {**SIZES, "model_type": "mistral", "sliding_window": 6, "head_dim": 8},
    "phi3": {
        **SIZES,
        "model_type": "phi3",
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        "sliding_window": None,
    },
    "mamba": {
        "model_type": "mamba",
        "vocab_size": 257,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        **NO_TOKENS,
    },
    "mamba2": {
        "model_type": "mamba2",
        "vocab_size": 257,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
        **NO_TOKENS,
    },
    "qwen3_5_text": {**SIZES, **LINEAR, "model_type": "qwen3_5_text", "head_dim": 16},
    "qwen3_next": {**SIZES, **LINEAR, "model_type": "qwen3_next", "head_dim": 8, "num_experts": 0},
    "kimi_linear": {
        **SIZES,
        "model_type": "kimi_linear",
        "num_key_value_heads": 4,
        "layer_types": LINEAR["layer_types"],
        "mlp_layer_types": ["dense"] * 3,
        "linear_num_heads": 2,
        "linear_head_dim": 8,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    },
    "minimax": {
        **SIZES,
        "model_type": "minimax",
        "layer_types": LINEAR["layer_types"],
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "rope_parameters": ROPE,
    },
    "recurrent_gemma": {
        **SIZES,
        "model_type": "recurrent_gemma",
        "block_types": ["recurrent", "attention", "recurrent"],
        "attention_window_size": 7,
        "attention_bias": True,
        "lru_width": 32,
        "logits_soft_cap": 1e6,
        "tie_word_embeddings": False,
    },
    "lfm2": {**SIZES, "model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 1e-6},
    "diffllama": {**SIZES, "model_type": "diffllama", "attention_bias": True},
    "gpt_oss": {
        **SIZES,
        "model_type": "gpt_oss",
        "layer_types": ["sliding_attention"] * 3,
        "sliding_window": 6,
        "head_dim": 8,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "swiglu_alpha": 1.0,
        "swiglu_limit": 1e30,
        "rope_parameters": ROPE,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 257,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 64,
        "activation_function": "gelu",
        **NO_TOKENS,
    },
}
"""Configs of random models that transformers saves and this project imports."""
WIDE = {"llama", "llama, two stages", "qwen3", "phi3", "gpt2, untied", "kimi_linear, latent queries", "diffllama"}
"""Exported models that only `make test-all` tests: of their layouts there is a harder one, or a further one."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on both sides.

    Attributes:
      direction: "exported" from here, or "imported" from transformers.
      logits_error: largest difference of a logit.
      greedy_equal: whether each of the 20 tokens that transformers generates greedily, for two prompts, is also the
        likeliest here after those before it. (That generation here follows the logits is tested elsewhere.)
      back_exact: of an exported model, whether importing it and exporting that gives the same file of weights.
      ids_equal: whether both tokenizers give a text the same ids; None without one.
      mixers_error: of a model as code, largest error of a mixer alone (with Canon layers, of a whole block), over its
        largest output; whole and streamed.
    """

    model: str
    direction: str
    logits_error: float
    greedy_equal: bool
    back_exact: bool | None
    ids_equal: bool | None
    mixers_error: float | None = None


def compared(root: Path, exported: Iterable[str] = EXPORTED, imported: Iterable[str] = THEIRS) -> list[Row]:
    """Returns a row per model of these names, from folders written to `root`."""
    for name in exported:
        config = EXPORTED[name]
        folder = root / _folder(name, "exported")
        as_code = {"as_code": name in CODE}
        export_huggingface(parameters(config), config, folder, facts=Facts(name), tokenizer=ByteTokenizer(), **as_code)
        if name in CODE:
            np.savez(folder / "mixers.npz", x=np.random.default_rng(1).normal(size=(2, 17, 32)).astype(np.float32))
    for name in imported:
        (root / _folder(name, "imported")).mkdir()
        (root / _folder(name, "imported") / "make.json").write_text(json.dumps(THEIRS[name]))
    side = Path(__file__).with_name("transformers_side.py")
    cache = {"HF_HOME": str(root.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([PYTHON, side, root], capture_output=True, text=True, env={**os.environ, **cache})
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    rows = [_row(name, "exported", root) for name in exported]
    return rows + [_row(name, "imported", root) for name in imported]


def _row(name: str, direction: str, root: Path) -> Row:
    folder = root / _folder(name, direction)
    theirs = np.load(folder / "results.npz")
    params, config, _ = import_huggingface(folder)
    back = None
    if direction == "exported":
        # Exported again: the layers of a stack may come back in other stages.
        export_huggingface(params, config, folder / "again", facts=Facts(name), as_code=name in CODE)
        weights = [(path / "model.safetensors").read_bytes() for path in (folder, folder / "again")]
        back = weights[0] == weights[1]
        params, config = parameters(EXPORTED[name]), EXPORTED[name]
    model = FunctionalModel(config, 257)
    tokens, continued = theirs["tokens"], np.concatenate([theirs["tokens"][:, :12], theirs["greedy"]], axis=1)
    # One program for both: the logits of given tokens, and of what was generated.
    rows = np.concatenate([np.pad(tokens, ((0, 0), (0, continued.shape[1] - tokens.shape[1]))), continued])
    logits = np.asarray(jax.jit(lambda params, rows: model.bind(params)(rows))(params, jnp.asarray(rows, jnp.int32)))
    likeliest = logits[len(tokens) :, 11:-1].argmax(-1)
    ids = None
    if "ids" in theirs:
        ids = theirs["ids"].tolist() == ByteTokenizer().encode("def naïve(x):\n  return 東京 🙂").tolist()
        ids = ids and theirs["special"].tolist() == [256, 256]
    error = float(np.abs(logits[: len(tokens), : tokens.shape[1]] - theirs["logits"]).max())
    mixers = _mixers_error(model, params, folder, theirs["mixers"]) if "mixers" in theirs else None
    return Row(name, direction, error, bool((likeliest == theirs["greedy"]).all()), back, ids, mixers)


def _mixers_error(model: FunctionalModel, params: Any, folder: Path, theirs: np.ndarray) -> float:
    x = jnp.asarray(np.load(folder / "mixers.npz")["x"])

    def outputs(params: Any) -> list[jax.Array]:
        layers = model.bind(params).stack.layers()
        return [(layer(x, Context()) if model.config.canon else layer.mixer(x)).hidden for layer in layers]

    blocks = jax.jit(outputs)(params)
    return max(
        float(np.abs(there - ours).max() / np.abs(ours).max()) for ours, there in zip(blocks, theirs, strict=True)
    )


def _folder(name: str, direction: str) -> str:
    return direction + "_" + re.sub(r"\W+", "_", name)


def _mark(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def main() -> int:
    """Prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:] in (["--programs"], ["--gguf"]):
            of = "programs" if sys.argv[1] == "--programs" else "gguf_models"
            importlib.import_module(f"tests.interop.{of}").print_rows(Path(folder))
            return 0
        named = "".join(sys.argv[1:2])
        rows = compared(Path(folder), *([name for name in of if name.startswith(named)] for of in (EXPORTED, THEIRS)))
    heads = ("model", "direction", "largest logit error", "greedy tokens equal", "weights back exactly")
    print("| " + " | ".join((*heads, "same token ids", "mixers alone")) + " |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        marks = " | ".join(map(_mark, (row.greedy_equal, row.back_exact, row.ids_equal)))
        mixers = "-" if row.mixers_error is None else f"{row.mixers_error:.1e}"
        print(f"| {row.model} | {row.direction} | {row.logits_error:.1e} | {marks} | {mixers} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
