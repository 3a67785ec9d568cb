"""Bytes of ids: they add up to the text with every tokenizer, and what it does not know is counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.data.tokenizers import ByteTokenizer, open_tokenizer
from recollect.data.tokenizers.huggingface import train_bpe
from tests.data.tokenizers.kinds_of_tokenizers import KINDS, save

LATIN, RUSSIAN = "the cat sat on a mat.\n\n  hello world", "Все счастливые семьи похожи друг на друга"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    found = {kind: open_tokenizer(str(save(kind, folder))) for kind in KINDS if kind != "silent_bpe"}
    found["silent_bpe"] = open_tokenizer(str(save("silent_bpe", folder)), "<s>")
    (folder / "bpe.json").write_text(train_bpe(iter([LATIN * 9]), 300))
    return found | {"bytes": ByteTokenizer(), "bpe": open_tokenizer(str(folder / "bpe.json"))}


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30) | st.sampled_from([LATIN, RUSSIAN, "▁▁ a", " x ", "\x00\x01", "e\u0301"]))
def test_bytes_of_ids_add_up_to_the_text(opened, text):
    raw = text.encode("utf-8", "replace")
    for name, tokenizer in opened.items():
        measured = tokenizer.measured_ids(raw)
        assert measured.ids.tolist() == tokenizer.ids(raw).tolist()
        assert len(measured.sizes) == len(measured.ids) and (measured.sizes >= 0).all()
        assert measured.sizes.sum() == len(raw) or not len(measured.ids), name
        assert 0 <= measured.unknown_bytes <= len(raw)
        assert tokenizer.unknown_bytes(raw, measured.ids) in (0, measured.unknown_bytes)


def test_what_is_unknown_is_counted(opened):
    size = len(RUSSIAN.encode())
    for name in ("word_piece", "unigram", "silent_bpe"):
        unknown = opened[name].measured_ids(RUSSIAN.encode()).unknown_bytes
        assert 0.8 * size <= unknown <= size, name  # all but the spaces
        assert opened[name].measured_ids(b"the cat sat").unknown_bytes == 0, name
        assert not opened[name].exact
        assert opened[name].unknown_bytes(RUSSIAN.encode(), opened[name].ids(RUSSIAN.encode())) == unknown, name
    for name in set(opened) - {"word_piece", "unigram", "silent_bpe"}:
        assert opened[name].measured_ids(RUSSIAN.encode()).unknown_bytes == 0, name
    assert not opened["byte_level_nfc"].exact and not opened["byte_level_prefix"].exact
    assert opened["bpe"].exact and opened["bytes"].exact


def test_spaces_that_are_spelt_in_bytes_count_once(opened):
    tokenizer, raw = opened["metaspace_without_piece"], LATIN.encode()
    measured = tokenizer.measured_ids(raw)
    # What was counted before: three bytes for each space.
    assert tokenizer.token_bytes[measured.ids].sum() > 1.3 * len(raw) and measured.sizes.sum() == len(raw)
