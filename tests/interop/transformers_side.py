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

torch.set_num_threads(1)  # the models are tiny
NEW_TOKENS = 20
TEXT = "def naïve(x):\n  return 東京 🙂"


def results(folder: Path) -> dict[str, np.ndarray]:
    """Logits of token ids, and greedy continuations of the first half of each row, as transformers computes them."""
    settings = {"output_loading_info": True, "dtype": torch.float32, "trust_remote_code": True}
    model, report = AutoModelForCausalLM.from_pretrained(folder, **settings)
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
    if (folder / "mixers.npz").exists():
        found["mixers"] = mixers(model, torch.tensor(np.load(folder / "mixers.npz")["x"]))
        check_padding(model, tokens)
    return {name: np.asarray(value) for name, value in found.items()}


def mixers(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Outputs (layers, 2, b, t, d) of every mixer, of Canon layers' whole block: over the whole sequence, and streamed
    in pieces."""
    module = sys.modules[type(model).__module__]
    rows, outputs = torch.ones(x.shape[:2], dtype=torch.bool), []
    positions = rows.long().cumsum(1) - 1
    with torch.no_grad():
        for layer in model.layers:
            mixes = layer if model.config.recollect["canon"] else layer.mixer
            whole, _ = mixes(x, module.Tokens(rows, positions), None)
            pieces, state = [], None
            for part in (slice(0, 5), slice(5, 6), slice(6, None)):
                y, state = mixes(x[:, part], module.Tokens(rows[:, part], positions[:, part]), state)
                pieces.append(y)
            outputs.append(torch.stack([whole, torch.cat(pieces, 1)]))
    return torch.stack(outputs)


def check_padding(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Checks that padding on either side changes neither logits nor what is generated, nor its logits."""
    rows = [tokens[:1, :9], tokens[1:, :14]]
    alone = [generated(model, row, torch.ones_like(row)) for row in rows]
    for part in (slice(5, 14), slice(0, 9)):
        ids, mask = tokens[:, :14].clone(), torch.ones(2, 14, dtype=torch.long)
        ids[0], mask[0] = 0, 0
        ids[0, part], mask[0, part] = rows[0][0], 1
        logits = model(ids, attention_mask=mask).logits
        assert (logits[0, part] - model(rows[0]).logits[0]).abs().max() < 1e-4, part
        for row, (text, logits) in enumerate(zip(*generated(model, ids, mask), strict=True)):
            assert (text == alone[row][0][0]).all() and (logits - alone[row][1][0]).abs().max() < 1e-4, (part, row)


def generated(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns greedy tokens (b, 6) after ids, and the logits (b, 6, z) that they were chosen by."""
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=mask, **options)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def make(fields: dict, folder: Path) -> None:
    """Saves a random model of a config, with numbers large enough that every path matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            gain = parameter.ndim == 1 and parameter.mean() == 1
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + float(gain))
    model.save_pretrained(folder)


if __name__ == "__main__":
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        if (folder / "make.json").exists():
            make(json.loads((folder / "make.json").read_text()), folder)
        np.savez(folder / "results.npz", **results(folder))
