"""Tokenizers: bytes come back, what an id stands for in bytes, and which token opens a document."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.configuration import UserError
from recollect.data.tokenizers import START, ByteTokenizer, bpe_size, huggingface, open_tokenizer
from recollect.data.tokenizers import text_chunks as chunking
from recollect.data.tokenizers.huggingface import START_TOKENS, FileTokenizer, train_bpe

TEXT = "naïve ☃ text\n\n    def f(x):\n        return x  # <|endoftext|> and <s>\n\t𝄞 1234 ... " * 5


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(train_bpe(iter([TEXT, "other words <s> <s> <s>"]), 310))
    return open_tokenizer(str(path))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_come_back(bpe, raw):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(raw)
        assert ids.dtype == np.int32 and ids[0] == tokenizer.start and ids.max() < tokenizer.vocabulary
        assert tokenizer.to_bytes(ids) == raw
        assert tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")
        assert tokenizer.token_bytes[ids].sum() == len(raw)
        assert [tokenizer.start, *tokenizer.ids(raw)] == ids.tolist()


def test_a_bpe_joins_pairs_of_its_text_and_knows_no_unknown(bpe):
    assert bpe.vocabulary == 310 and bpe.token_bytes.shape == (310,) and bpe.token_bytes.max() > 1
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2
    assert bpe.start_token == "<|endoftext|>" and bpe.token_bytes[bpe.start] == 0
    assert train_bpe(iter([TEXT, "other words <s> <s> <s>"]), 310) == train_bpe(
        iter([TEXT, "other words <s> <s> <s>"]), 310
    )


def test_text_is_never_a_special_token(bpe):
    assert bpe.start not in bpe.encode("a <|endoftext|> b")[1:]
    assert bpe.decode(bpe.encode("a <|endoftext|> b")) == "a <|endoftext|> b"


def test_long_texts_are_encoded_in_chunks(bpe, monkeypatch):
    whole = bpe.encode(TEXT)
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 7)
    ids = bpe.encode(TEXT)
    assert len(TEXT.encode()) > 100 and ids.tolist() != whole.tolist()  # the cuts show
    assert bpe.to_bytes(ids) == TEXT.encode() and bpe.token_bytes[ids].sum() == len(TEXT.encode())


def test_cut_characters_show_as_replaced(bpe):
    ids = bpe.encode("☃")
    assert ids.tolist() != [bpe.start] and "�" in bpe.decode(ids[:2]) if len(ids) > 2 else bpe.decode(ids) == "☃"


def word_pieces():
    model = tokenizers.models.WordPiece({"[UNK]": 0, "[CLS]": 1, "ab": 2, "##c": 3, "☃": 4}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


def sentence_pieces():
    pieces = {"<unk>": 0, "<s>": 1, "▁a": 2, "▁": 3, "b": 4, "a": 5} | {
        f"<0x{byte:02X}>": 6 + byte for byte in range(256)
    }
    model = tokenizers.models.BPE(pieces, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Metaspace(prepend_scheme="never"),
            tokenizers.decoders.Fuse(),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def test_bytes_of_pieces_of_other_kinds(tmp_path):
    sentence_pieces().save(str(tmp_path / "sentence.json"))
    tokenizer = open_tokenizer(str(tmp_path / "sentence.json"))
    text = "a b ab ☃ a"
    ids = tokenizer.encode(text)
    assert tokenizer.start_token == "<s>" and tokenizer.decode(ids) == text and tokenizer.to_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()) and tokenizer.token_bytes[:2].tolist() == [0, 0]
    word_pieces().save(str(tmp_path / "words.json"))
    tokenizer = open_tokenizer(str(tmp_path / "words.json"))
    ids = tokenizer.encode("abc ☃")
    assert tokenizer.start_token == "[CLS]" and ids.tolist() == [1, 2, 3, 4]
    assert tokenizer.token_bytes.tolist() == [0, 0, 2, 1, 3]  # a space between words has no token
    assert tokenizer.encode(b"ab \xff")[1] == 2  # not byte-level: what is not UTF-8 is replaced


def test_the_token_that_opens_documents(tmp_path, bpe):
    tokenizer = word_pieces()
    tokenizer.add_special_tokens(["<begin>"])
    path = str(tmp_path / "tokenizer.json")
    tokenizer.save(path)
    named, default = open_tokenizer(path, "<begin>"), open_tokenizer(path)
    assert (named.start_token, default.start_token) == ("<begin>", "[CLS]") and named.digest != default.digest
    assert open_tokenizer(str(tmp_path)).digest == default.digest  # a folder that holds it
    with pytest.raises(UserError, match=r"has no token to open a document with \(looked for '<nope>'\)"):
        open_tokenizer(path, "<nope>")
    # A piece that was learned from text and looks like such a token is none.
    facts = json.loads(tokenizer.to_str())
    facts["model"]["vocab"]["<s>"] = 6
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] == "[UNK]"]
    (tmp_path / "without.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=f"looked for .*{START_TOKENS[1][2:-2]}.*; name one with --start"):
        open_tokenizer(str(tmp_path / "without.json"))


def test_settings_for_batches_of_texts_are_left_out(tmp_path, bpe):
    tokenizer = word_pieces()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [CLS]", special_tokens=[("[CLS]", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert FileTokenizer(tmp_path / "tokenizer.json").encode("ab ab ab ab").tolist() == [1, 2, 2, 2, 2]


def test_tokenizers_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"only a tokenizer\.json has named tokens"):
        open_tokenizer("bytes", "<s>")
    with pytest.raises(UserError, match=r"is trained on a source, by `recollect prepare"):
        open_tokenizer("bpe:1000")
    for name in ("bpe:", "bpe:many", "bpe:256", "bpe:-5", "bpe:²"):
        with pytest.raises(UserError, match="needs a size of at least 257"):
            bpe_size(name)
    assert bpe_size("bpe:257") == 257 and bpe_size("bytes") is None


def test_byte_alphabet_is_the_library_s():
    assert set(huggingface.byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for byte, raw in ((byte, chr(byte)) for byte in range(128)):
        assert huggingface.byte_alphabet()[split.pre_tokenize_str(raw)[0][0]] == byte
    assert open_tokenizer("bytes").start == START
