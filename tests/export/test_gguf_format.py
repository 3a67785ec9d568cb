"""What a GGUF file cannot hold is refused by the field's name (files themselves: tests/interop/test_gguf.py)."""

import json
import sys
import types
from unittest.mock import MagicMock

import chz
import pytest
import tokenizers

from recollect.configuration import UserError
from recollect.data.tokenizers import ByteTokenizer, open_tokenizer
from recollect.export.gguf_format import add_tokenizer, export_gguf
from recollect.export.huggingface import Facts
from recollect.layers import Mamba, Mamba2
from recollect.models import Canon, Stage
from tests.export.huggingface.cases import FLASH, GGUF, MODELS


def with_mixers(model, *mixers):
    return chz.replace(model, stages=(Stage(pattern=mixers),))


LINEAR, ATTENTION = GGUF["qwen35"].mixers[:2]
DELTA, LATENT = GGUF["kimi-linear"].mixers[:2]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (chz.replace(MODELS["llama"], canon=Canon()), "model.canon=Canon stands in the way of a Hugging Face export"),
        (chz.replace(MODELS["llama"], embedding_scale=2.0), "model.embedding_scale=2.0 stands in the way"),
        (with_mixers(MODELS["llama"], MODELS["llama"].mixers[0], ATTENTION), "layer 1: mixer=GatedAttention stands"),
        (FLASH["rwkv7"], "this model is rwkv7's; llama, qwen3, qwen3_5_text, kimi_linear, mamba, mamba2 are written"),
        (MODELS["qwen3, windows in some layers, biases"], "window=6 .* llama.cpp's qwen3 has no windows"),
        (with_mixers(MODELS["qwen3"], chz.replace(MODELS["qwen3"].mixers[0], bias=True)), "bias=True .* has no biases"),
        (with_mixers(GGUF["qwen35"], LINEAR, chz.replace(ATTENTION, bias=True)), "bias=True stands .* Qwen3.5's gates"),
        (MODELS["qwen3_5_text"], "value_dim=6 .* llama.cpp's qwen35 has as many dimensions as of keys, 8"),
        (
            with_mixers(GGUF["qwen35"], ATTENTION, LINEAR, ATTENTION),
            "model.stages=.* in each n-th layer and in no other",
        ),
        (with_mixers(GGUF["qwen35"], ATTENTION, ATTENTION), "model.stages=full_attention .* layers of both kinds"),
        (with_mixers(GGUF["kimi-linear"], DELTA, DELTA), "model.stages=linear_attention .* layers of both kinds"),
        (MODELS["kimi_linear"], "heads=2 .* as many in all layers, and latent attention has 4"),
        (
            with_mixers(GGUF["kimi-linear"], DELTA, chz.replace(LATENT, query_rank=10)),
            "query_rank=10 .* no latent queries",
        ),
        (with_mixers(MODELS["mamba"], Mamba(expansion=3)), "expansion=3 .* llama.cpp's mamba has 2"),
        (with_mixers(MODELS["mamba2"], Mamba2(heads=4, key_dim=6)), "key_dim=6 .* a divisor of the dimensions of all"),
    ],
)
def test_what_no_file_can_hold_is_refused(tmp_path, monkeypatch, model, message):
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    with pytest.raises(UserError, match=message):
        export_gguf({"embedding": 0.0}, model, tmp_path / "out", facts=Facts("toy"))
    assert not (tmp_path / "out").exists()


def test_bytes_get_a_merge_that_merges_nothing():
    writer = MagicMock()
    add_tokenizer(writer, ByteTokenizer(), MagicMock())
    (merges,) = writer.add_token_merges.call_args.args
    (tokens,) = writer.add_token_list.call_args.args
    assert [set(merge.split(" ")) for merge in merges] == [{tokens[256]}]


def test_a_tokenizer_that_splits_text_otherwise_is_refused(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<s>": 3}, merges=[("a", "b")]))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    splits = [digits, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Sequence(splits), tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    with pytest.raises(UserError, match="does not split text as GPT-2's"):
        add_tokenizer(MagicMock(), open_tokenizer(str(path), "<s>"), MagicMock())
    made.pre_tokenizer = splits[1]
    made.save(str(path))
    writer = MagicMock()
    add_tokenizer(writer, open_tokenizer(str(path), "<s>"), MagicMock())
    assert writer.add_token_merges.call_args.args == (["a b"],) and json.loads(path.read_text())["model"]["merges"]
