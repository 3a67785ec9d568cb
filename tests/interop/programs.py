"""Models here beside their StableHLO programs, which jax runs by itself (tests/export/test_stablehlo.py runs them in a
process that has nothing else): the rows that `python -m tests.interop.comparison --programs` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from recollect.export.stablehlo import PROGRAMS, export_stablehlo
from recollect.models import FunctionalModel, Sampling, generate
from tests.export.huggingface.cases import CODE, FLASH, MODELS, parameters

FAMILIES = ("llama", "qwen3, windows in some layers, biases", "gpt2", "mamba", "mamba2", "qwen3_5_text", "kimi_linear")
FAMILIES += ("recurrent_gemma", "lfm2", "diffllama", "gpt_oss", "gla", "retnet", "hgrn2", "code, based", "code, heads")
PROMPT, NEW = 12, 20


def row_of(name: str, folder: Path) -> tuple[float, bool, str]:
    """Returns the largest error of a logit (whole sequences, prefill and steps), whether greedy tokens are equal, and
    the sizes of the programs forward and prefill: numbers, or letters where they are free."""
    config = (MODELS | FLASH | CODE)[name]
    params, model = parameters(config), FunctionalModel(config, 257)
    export_stablehlo(params, model, folder, maximum_length=PROMPT + NEW)
    sizes = json.loads((folder / "manifest.json").read_text())["sizes"]
    programs = {name: export.deserialize(bytearray((folder / f"{name}.bin").read_bytes())).call for name in PROGRAMS}
    weights = dict(np.load(folder / "weights.npz"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, PROMPT + NEW)), jnp.int32)
    if sizes["forward"]["batch"] != "b":
        tokens = tokens[:1]
    whole = jax.jit(lambda params, tokens: model.bind(params)(tokens))
    errors = [_error(programs["forward"](weights, tokens), whole(params, tokens))]
    greedy = generate(model, params, np.asarray(tokens[:, :PROMPT]), NEW, Sampling(temperature=0.0))
    padding = 0 if sizes["prefill"]["length"] == "t" else NEW
    prompt = jnp.pad(tokens[:, :PROMPT], ((0, 0), (padding, 0)))
    logits, state = programs["prefill"](weights, prompt, jnp.arange(prompt.shape[1])[None] >= padding + 0 * prompt)
    step, text = jax.jit(programs["step"]), []
    for _ in range(NEW):
        text.append(jnp.argmax(logits, -1).astype(jnp.int32))
        if len(text) < NEW:
            logits, state = step(weights, text[-1], state)
    generated = np.stack(text, 1)
    continued = jnp.concatenate([tokens[:, :PROMPT], generated], 1)
    errors.append(_error(logits, whole(params, continued)[:, -2]))
    shown = ", ".join(f"{part} {size['batch']} x {size['length']}" for part, size in sizes.items() if part != "step")
    return max(errors), bool((generated == greedy).all()), shown


def _error(there: Any, here: Any) -> float:
    return float(np.abs(np.asarray(there) - np.asarray(here)).max())


def print_rows(root: Path) -> None:
    """Prints the table."""
    print("| model | largest logit error | greedy tokens equal | free sizes |\n|---|---|---|---|")
    for number, name in enumerate(FAMILIES):
        error, equal, sizes = row_of(name, root / str(number))
        print(f"| {name} | {error:.1e} | {'yes' if equal else 'no'} | {sizes} |", flush=True)
