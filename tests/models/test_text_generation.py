"""Text that comes bit by bit is the text of all ids at once."""

import numpy as np
import pytest
import tokenizers

from recollect.configuration import UserError
from recollect.data.tokenizers import ByteTokenizer, open_tokenizer
from recollect.layers import LinearAttention
from recollect.models import Sampling, continue_texts, repeat
from recollect.models.text_generation import LONGEST_DOUBT, TextStream
from tests.models.probes import functional

BYTES = ByteTokenizer()
MODEL, PARAMS = functional(257, width=16, stages=repeat(LinearAttention(heads=2, feature_dim=3), depth=1), tied=False)


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    """A SentencePiece-like tokenizer, whose words begin with the space before them and are stripped of the first."""
    words = ["<s>", "<unk>", "▁", "▁the", "▁cat", "s", "▁na", "ï", "ve"]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["<s>"])
    path = tmp_path_factory.mktemp("metaspace") / "tokenizer.json"
    made.save(str(path))
    return open_tokenizer(str(path))


def streamed(tokenizer, prompt, prompt_ids, ids, stops=()):
    """The parts of a text, the last held back until the end."""
    stream = TextStream(tokenizer, prompt, prompt_ids, stops)
    parts = []
    for number in ids:
        parts.append(stream.add(number))
        if stream.stopped:
            break
    return [*parts, stream.close()], stream


def test_characters_of_several_bytes_come_whole():
    text = "naïve 東京 🙂!"
    parts, _ = streamed(BYTES, "", BYTES.encode(""), BYTES.ids(text.encode()))
    assert "".join(parts) == text and "ï" in parts and "東" in parts and "🙂" in parts


def test_bytes_that_are_no_text_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    for ids in (rng.integers(0, 256, 300), np.full(4 * LONGEST_DOUBT, 0x80), rng.integers(0xC0, 0x100, 300)):
        parts, _ = streamed(BYTES, "a", BYTES.encode("a"), ids)
        assert "".join(parts) == BYTES.decode(ids)
    cut, _ = streamed(BYTES, "", BYTES.encode(""), list("日".encode()[:2]))
    assert cut == ["", "", "�"], "what never becomes whole is shown at the end"


def test_words_keep_the_space_before_them(metaspace):
    parts, _ = streamed(metaspace, "the cat", [0, 3, 4], [5, 3, 4, 6, 7, 8, 3])
    assert parts == ["s", " the", " cat", " na", "ï", "ve", " the", ""]
    long = [3, 4, 5] * 20
    assert "".join(streamed(metaspace, "the", [0, 3], long)[0]) == metaspace.continuation([0, 3], long)


def test_a_prompt_that_ends_with_a_space_gets_no_second_one(metaspace):
    assert streamed(metaspace, "the ", [0, 3], [4, 3])[0] == ["cat", " the", ""]
    assert streamed(metaspace, "the", [0, 3], [4, 3])[0] == [" cat", " the", ""]
    assert metaspace.decode([0, 3]) == "the"


@pytest.mark.parametrize(
    ("stops", "expected", "stopped"),
    [
        (["cd"], "ab", True),
        (["ce", "de"], "abc", True),
        (["bcx", "f"], "abcde", True),
        (["efg"], "abcdef", False),
        (["x"], "abcdef", False),
        (["bcd", "c"], "ab", True),
        (["a"], "", True),
    ],
)
def test_stop_strings(stops, expected, stopped):
    parts, stream = streamed(BYTES, "", BYTES.encode(""), BYTES.ids(b"abcdef"), stops)
    assert "".join(parts) == expected and stream.stopped is stopped


def test_what_may_begin_a_stop_string_waits():
    assert streamed(BYTES, "", [256], BYTES.ids(b"abaac"), ["aac"])[0] == ["", "ab", "", "", "", ""]
    assert streamed(BYTES, "", [256], BYTES.ids(b"aaab"), ["aac"])[0] == ["", "", "a", "aab", ""]


def collected(prompts, tokens, **settings):
    """Text, ids and finish of each prompt."""
    rows = [["", [], None] for _ in prompts]
    stops = settings.pop("stops", ())
    for part in continue_texts(MODEL, PARAMS, BYTES, prompts, tokens, Sampling(**settings), stops):
        row = rows[part.row]
        assert row[2] is None, "nothing follows the end"
        row[0], row[1], row[2] = row[0] + part.text, row[1] + part.tokens, part.finish
        assert len(part.tokens) == len(part.log_probabilities)
    return rows


def test_texts_end_at_a_stop_string_at_the_documents_end_or_at_the_last_token():
    free = collected(["ab", "c"], 40, seed=3)
    assert [row[2] for row in free] == ["length", "length"] and [len(row[1]) for row in free] == [40, 40]
    assert free[0][0] == BYTES.decode(free[0][1])
    at = next(n for n in range(17, 38) if free[0][1][n] < 128)
    stop = chr(free[0][1][at])
    stopped = collected(["ab", "c"], 40, seed=3, stops=[stop])
    first = free[0][1].index(ord(stop))
    assert stopped[0][2] == "stop" and stopped[0][1] == free[0][1][: first + 1]
    assert stopped[0][0] == BYTES.decode(free[0][1][:first])
    assert collected(["ab"], 40, seed=3)[0] == free[0], "alone as in the batch"

    class Ending(ByteTokenizer):
        start = free[0][1][20]

        def encode(self, text):
            return BYTES.encode(text)

    parts = list(continue_texts(MODEL, PARAMS, Ending(), ["ab"], 40, Sampling(seed=3)))
    ids = [number for part in parts for number in part.tokens]
    assert parts[-1].finish == "end" and ids == free[0][1][: free[0][1].index(Ending.start) + 1]


def test_mistakes():
    with pytest.raises(UserError, match="stop='': an empty text"):
        list(continue_texts(MODEL, PARAMS, BYTES, ["a"], 3, stops=[""]))
