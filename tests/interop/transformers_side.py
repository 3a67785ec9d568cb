"""The transformers library's half of the interoperability tests. It runs in an environment that has torch (`make
test-interop`) and knows nothing of this project.

    python transformers_side.py ROOT

In each folder of ROOT: where there is a make.json, a random model of that config is saved; then the model is loaded,
and results.npz gets its logits, a greedy continuation, and the ids of a text if there is a tokenizer.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 20
TEXT = "def naïve(x):\n  return 東京 🙂"


def results(folder: Path) -> dict[str, np.ndarray]:
    """Logits of token ids, and greedy continuations of the first half of each row, as transformers computes them."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    tokens = torch.tensor(np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24)))
    prompts = tokens[:, :12]
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        text = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    found = {"tokens": tokens, "logits": logits, "greedy": text[:, 12:]}
    if (folder / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(TEXT)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
        found |= {"ids": ids, "special": [tokenizer.bos_token_id, tokenizer.eos_token_id]}
    return {name: np.asarray(value) for name, value in found.items()}


def make(fields: dict, folder: Path) -> None:
    """Saves a random model of a config, with numbers large enough that every path matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + float(gain))
    model.save_pretrained(folder)


if __name__ == "__main__":
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        if (folder / "make.json").exists():
            make(json.loads((folder / "make.json").read_text()), folder)
        np.savez(folder / "results.npz", **results(folder))
