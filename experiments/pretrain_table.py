"""Names and docstrings of `experiments/pretrain.py`: patterns x sizes. Plain text, so that listing waits for no jax."""

from __future__ import annotations

from collections.abc import Mapping

SIZES = {
    "30m": {"size": "30M", "hardware": "two CPU cores", "window": "128", "based_window": "64"},
    "125m": {"size": "125M", "hardware": "one H100", "window": "512", "based_window": "128"},
    "360m": {"size": "360M", "hardware": "one H100", "window": "512", "based_window": "128"},
    "1b": {"size": "1B", "hardware": "eight H100 or a TPU slice", "window": "512", "based_window": "128"},
}
"""Size -> what docstrings hold in {}."""

PATTERNS = {
    "attention": "Softmax attention in every layer, rotary positions on half of each head",
    "based": "Based: gated convolutions, Taylor linear attention, windows of {based_window} tokens before the query",
    "window": "Sliding windows of {window} tokens in every layer",
    "landmark": "Landmark attention in blocks of 63 tokens in every layer",
    "mixture_of_heads": "Mixture of heads in every layer: half shared, half of the rest active, 75 % in all",
    "hyena": "Hyena in every layer, filters as long as a row",
    "delta_net": "DeltaNet in every layer, heads of 128 dimensions",
    "gated_delta_net": "Gated DeltaNet in every layer, values twice as wide as keys",
    "kimi_delta_attention": "Kimi Delta Attention (KDA) in every layer, heads of 128 dimensions",
    "gla": "Gated linear attention (GLA) in every layer, heads of 128 key and 256 value dimensions",
    "mamba2": "Mamba-2 in twice as many layers, without MLPs, heads of 64 dimensions and a state of 128",
    "rwkv7": "RWKV-7's time mixing in every layer, heads of 64 dimensions",
    "samba": "Samba's pattern: Mamba and a window of {window} tokens in turn",
    "griffin": "Griffin: two recurrent blocks (RG-LRU), one window of {window} tokens with one key head, in turn",
    "jamba": "Jamba's pattern: seven layers of Mamba, one of softmax attention without positions",
    "qwen3_next": "Qwen3-Next's pattern: three layers of Gated DeltaNet, one of gated attention",
    "kimi_linear": "Kimi Linear's pattern: three layers of KDA, one of latent attention without positions",
    "minimax_01": "MiniMax-01's pattern: seven layers of lightning attention, one of softmax attention",
    "striped_hyena_2": "StripedHyena 2's pattern: short, medium and long filters (Hyena-2), one softmax layer in seven",
    "transnormer": "TransNormerLLM with its code's decays (its paper's: model...decay=paper)",
}
"""Pattern -> what its layers are."""

PUBLISHED = {
    ("attention", "360m"): "Published shape",
    ("based", "360m"): "Published shape",
    ("based", "1b"): "Published shape (1.3B)",
    ("landmark", "125m"): "Published optimizer",
    ("mixture_of_heads", "125m"): "Published shape and learning rate",
    **{("mamba2", size): "Published shape" for size in ("125m", "360m", "1b")},
}
"""What of a variant is as published."""

HOURS = {
    "attention": (2.6, 430),
    "based": (2.2, 511),
    "window": (2.5, 459),
    "landmark": (3.6, 317),
    "mixture_of_heads": (2.7, 429),
    "hyena": (3.0, 377),
}
"""Pattern -> hours of its 30M run, from the tokens per second of `bench pretraining` (2026-11-23)."""

MEMORY = {("attention", "360m"): 40.3, ("based", "360m"): 46.1}
"""GiB of an H100 that the step takes (bytes, `describe --target h100`)."""


def docstring(pattern: str, size: str) -> str:
    """Returns the docstring of `pretrain.PATTERN_SIZE`: what it is, its command, hardware, hours and loss."""
    facts: Mapping[str, str] = SIZES[size]
    name, published = f"pretrain.{pattern}_{size}", PUBLISHED.get((pattern, size))
    summary = f"{PATTERNS[pattern].format(**facts)}, {facts['size']}." + (f" {published}." if published else "")
    source = "" if size == "30m" else " data.source=FOLDER"
    memory = MEMORY.get((pattern, size))
    taken = f"; of its memory the step takes {memory} GiB (bytes, `describe --target h100`)" if memory else ""
    hours, rate = HOURS.get(pattern, (None, None)) if size == "30m" else (None, None)
    timed = f"Hours: {hours} at the {rate} tokens per second of `bench pretraining` (2026-11-23). Loss: not yet run."
    run = timed if hours else "Hours and loss: not yet run."
    return f"{summary}\n\npython main.py train {name}{source}\nHardware: {facts['hardware']}{taken}. {run}"


DOCSTRINGS = {f"{pattern}_{size}": docstring(pattern, size) for pattern in PATTERNS for size in SIZES}
"""Name -> docstring of every variant."""
