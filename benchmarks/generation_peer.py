"""Times transformers on torch in a process of its own, for `bench generation --peer-python PYTHON`: prefill and
decoding of an exported model.

Answers JSON lines {"folder", "rows", "prompt", "piece", "pieces"} with {"prefill_tokens_per_second",
"decode_tokens_per_second", "step_seconds", "seconds", "version"}. Of this project only files are imported that need no
more than the standard library.

Decoding is its model called token by token with its default cache, greedily: `generate` does the same and more around
it, so it would be slower.
"""

import functools
import statistics
import time

import torch
import transformers

from recollect.benchmarks import peer_side


@functools.lru_cache(maxsize=1)
def model_in(folder: str):
    """Returns the model of a folder, fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def measure(case: dict) -> dict:
    """Returns the rates; as ours, of the second of two prefills, and the median of the pieces but the first."""
    model = model_in(case["folder"])
    prompts = torch.randint(model.config.vocab_size, (case["rows"], case["prompt"]))
    for _ in range(2):
        begun = time.perf_counter()
        out = model(prompts, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - begun
    seconds = []
    for _ in range(1 + case["pieces"]):
        begun = time.perf_counter()
        for _ in range(case["piece"]):
            tokens = out.logits[:, -1:].argmax(-1)
            out = model(tokens, past_key_values=out.past_key_values, use_cache=True)
        seconds.append((time.perf_counter() - begun) / case["piece"])
    step = statistics.median(seconds[1:])
    return {
        "prefill_tokens_per_second": prompts.numel() / prefill,
        "decode_tokens_per_second": case["rows"] / step,
        "step_seconds": step,
        "seconds": seconds,
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


if __name__ == "__main__":
    peer_side.serve(measure)
