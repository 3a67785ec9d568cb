"""Bits per byte by hand, and that they compare between tokenizers of the same text."""

import math
from pathlib import Path

import numpy as np
import pytest

from recollect.data.text.dataset import Text
from recollect.evaluation.intervals import ratio_interval
from recollect.evaluation.ngram_baselines import fit_bigram
from recollect.evaluation.text_slices import evaluate_text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of a few words over and over, so that a tokenizer finds parts of them; the cache is this module's own."""
    root = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    words = np.array(["attention", "recall", "state", "window", "naïve", "kernel", "gate", "\n", "landmark", "head"])
    (root / "corpus").mkdir()
    for index in range(50):
        drawn = random.choice(words, int(random.integers(5, 120)))
        (root / "corpus" / f"{index}.txt").write_text(" ".join(drawn))
    return root


@pytest.fixture(autouse=True)
def cache(corpus, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CACHE", str(corpus / "cache"))


def text(corpus, **fields):
    return Text(source=str(corpus / "corpus"), length=32, held_out_bytes=None, **fields)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_bits_per_byte_are_of_the_text_whatever_the_tokenizer(corpus, tokenizer):
    data = text(corpus, tokenizer=tokenizer)
    found = evaluate_text(lambda batch: np.full(batch.targets.shape, 2.0), data, 4, final=True)
    held_out = data.prepared().held_out
    size, targets = int(held_out.byte_lengths.sum()), int(held_out.lengths.sum()) - len(held_out)
    assert found["bytes"] == size and found["targets"] == targets and (targets < size / 2) == (tokenizer != "bytes")
    assert found["loss"] == pytest.approx(2) and found["bits_per_byte"] == pytest.approx(
        2 * targets / size / math.log(2)
    )
    shares = found["share_by_slice"]
    assert sum(shares.values()) == pytest.approx(1) and found["baseline_tokens"] == data.prepared().train.lengths.sum()
    assert 0 < found["bigram_bits_per_byte"] < 5


def test_perplexity_by_position_whatever_the_batch(corpus):
    """Losses that tell how many tokens of the document the row holds up to the target."""

    def losses(batch):
        before = np.zeros(batch.tokens.shape, int)
        for row, segments in enumerate(np.asarray(batch.segments)):
            for at, segment in enumerate(segments):
                before[row, at] = 1 + (before[row, at - 1] if at and segments[at - 1] == segment else 0)
        return np.log2(before).astype(int) + np.log(2)

    data = text(corpus)
    one, several = (evaluate_text(losses, data, rows, final=True) for rows in (1, 5))
    found = one.pop("perplexity_by_position")
    assert list(found) == ["1", "2-3", "4-7", "8-15", "16-31", "32-63"]
    assert list(found.values()) == pytest.approx([2 * math.e**depth for depth in range(6)])
    assert several.pop("perplexity_by_position") == pytest.approx(found)
    assert one["bits_per_byte"] == pytest.approx(several["bits_per_byte"], rel=1e-12)
    assert one["targets"] == several["targets"] and "unknown" not in one


@pytest.mark.parametrize("rows", [1, 5])
def test_intervals_are_over_documents(corpus, rows):
    data = text(corpus)
    found = evaluate_text(lambda batch: np.asarray(batch.targets) / 100, data, rows, final=True)
    documents = data.prepared().held_out
    sums = np.array([documents.tokens(n, 1, int(length)).sum() / 100 for n, length in enumerate(documents.lengths)])
    assert found["documents"] == len(documents) >= 3
    assert found["intervals"]["loss"] == pytest.approx(ratio_interval(sums, documents.lengths - 1))
    low, high = ratio_interval(sums / math.log(2), documents.byte_lengths)
    assert found["intervals"]["bits_per_byte"] == pytest.approx((low, high)) and low < found["bits_per_byte"] < high


def test_unknown_tokens_are_counted_and_cost_their_bytes(corpus, monkeypatch):
    data = text(corpus)
    tokenizer = data.open_tokenizer()
    assert tokenizer.unknown is None
    monkeypatch.setattr(type(tokenizer), "unknown", ord("n"))
    found = evaluate_text(lambda batch: np.full(batch.targets.shape, 2.0), data, 4, final=True)
    count = sum(path.read_text().count("n") for path in held_out_files(data))
    assert found["unknown"] == {"targets": count, "bytes": count}
    assert found["bits_per_byte"] == pytest.approx(2 / math.log(2) + 8 * count / found["bytes"])


def held_out_files(data):
    """Paths of what is held out, by its text."""
    files = {path.read_text(): path for path in Path(data.source).iterdir()}
    documents = data.prepared().held_out
    return [files[documents.text(number).decode()] for number in range(len(documents))]


def test_a_byte_model_and_a_bpe_model_of_the_same_bigrams_are_on_one_scale(corpus):
    """Ten words at random: some 3.3 bits per word and its space, which parts of words see and bytes do not."""
    found = {}
    for tokenizer in ("bytes", "bpe:300"):
        data = text(corpus, tokenizer=tokenizer)
        found[tokenizer] = evaluate_text(
            lambda batch, data=data: fit_bigram(data.prepared()).loss(batch.tokens, batch.targets), data, 4, final=True
        )
        assert found[tokenizer]["bits_per_byte"] == pytest.approx(found[tokenizer]["bigram_bits_per_byte"])
    assert found["bpe:300"]["bits_per_byte"] < 0.8 * found["bytes"]["bits_per_byte"]


def test_prompts_and_vocabularies_are_the_tokenizers(corpus):
    data = text(corpus, tokenizer="bpe:300")
    tokenizer = data.prepared().tokenizer
    assert data.vocabulary == tokenizer.vocabulary <= 300
    prompt = data.prompt(seed=0, length=5)
    assert prompt[0] == tokenizer.start and len(prompt) <= 5
    assert data.prepared().held_out.text(0).startswith(tokenizer.to_bytes(prompt))
    assert data.decode([*data.encode("naïve recall"), tokenizer.start, 5]) == "naïve recall"
    assert data.batches(0, 2).read(0, 0, 2).tokens.max() < data.vocabulary
    assert text(corpus).vocabulary == 257  # asked for without preparing anything
