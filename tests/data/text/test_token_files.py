"""Token ids in .npy and .bin files as a source of training rows, read in place."""

import concurrent.futures
import json
import math
import threading

import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.text import Chunked, Text, token_files
from recollect.data.text.token_files import open_token_files
from recollect.evaluation.text_slices import evaluate_text
from recollect.main import main

END = 64
SMALL = (
    *("model.width=16", "data.length=32", "run.batch_size=2", "run.steps=2", "run.steps_per_call=2"),
    *("run.sample_every=0", "run.compile_cache=off", "data.held_out_bytes=200"),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ids():
    """2,000 ids below 64, and the id 64 after each hundred."""
    ids = np.random.default_rng(0).integers(0, END, 2000).astype(np.uint16)
    ids[99::100] = END
    return ids


@pytest.fixture
def folder(tmp_path, ids):
    """A folder as nanoGPT's scripts leave it, with a pickle that would do harm and text that is not the corpus."""
    folder = tmp_path / "data"
    folder.mkdir()
    ids[:1800].tofile(folder / "train.bin")
    ids[1800:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "harm").encode() + b"'\ntR.")
    (folder / "input.txt").write_text("some words\n" * 100)
    return folder


def test_reads_nanogpts_folder_with_its_splits(folder, ids, tmp_path):
    for source in (folder, folder / "train.bin"):
        corpus = Text(source=str(source)).prepared()
        np.testing.assert_array_equal(corpus.train.tokens(0), ids[:1800])
        np.testing.assert_array_equal(corpus.held_out.tokens(0), ids[1800:])
    assert (
        Text(source=str(folder)).vocabulary == END + 1 and Text(source=str(folder), vocabulary_size=99).vocabulary == 99
    )
    assert isinstance(corpus.train._files[0].ids, np.memmap) and not (tmp_path / "harm").exists()


def test_every_id_but_the_first_is_a_target_once(folder, ids):
    data = Text(source=str(folder), length=32, sequences=Chunked(document_mask=False), shuffle=False)
    batches = data.batches(0, 4)
    seen = [batches.read(number, 0, 4) for number in range(-(-sum(batches.plan.counts) // 4))]
    targets = np.concatenate([batch.targets[batch.weights > 0] for batch in seen])
    assert targets[:1799].tolist() == ids[1:1800].tolist()
    held = [
        batch.targets[batch.weights > 0]
        for batch in Text(source=str(folder), held_out_bytes=None).evaluation_batches(2)
    ]
    assert np.concatenate(held).tolist() == ids[1801:].tolist()


def test_documents_end_with_the_token_asked_for_and_open_with_the_one_before(folder, ids):
    documents = Text(source=str(folder), end_token=END).prepared().train
    assert len(documents) == 18 and documents.lengths.tolist() == [100] + [101] * 17
    np.testing.assert_array_equal(documents.tokens(0), ids[:100])
    np.testing.assert_array_equal(documents.tokens(3), ids[299:400])
    np.testing.assert_array_equal(documents.tokens(3, 5, 9), ids[304:308])


def test_numpy_and_wide_files_hold_out_their_end_and_keep_digests_by_content(tmp_path, ids):
    np.save(tmp_path / "ids.npy", ids.astype(np.int64))
    ids.astype(np.uint32).tofile(tmp_path / "wide.bin")
    narrow = Text(source=str(tmp_path / "ids.npy")).prepared()
    wide = Text(source=str(tmp_path / "wide.bin"), token_type="uint32").prepared()
    for corpus in (narrow, wide):
        np.testing.assert_array_equal(corpus.train.tokens(0), ids[:1900])
        np.testing.assert_array_equal(corpus.held_out.tokens(0), ids[1900:])
    (tmp_path / "ids.npy").rename(tmp_path / "moved.npy")
    assert Text(source=str(tmp_path / "moved.npy")).corpus_digest() == narrow.digest != wide.digest
    changed = ids.copy()
    changed[7] = 1 + changed[7] % 60
    np.save(tmp_path / "moved.npy", changed.astype(np.int64))
    assert open_token_files(str(tmp_path / "moved.npy"), "uint16", None, None, None, None).digest != narrow.digest


def test_losses_are_per_token_unless_a_tokenizer_says_the_bytes(folder):
    def losses(batch):
        return np.full(batch.targets.shape, math.log(2))

    per_token = evaluate_text(losses, Text(source=str(folder), length=32), 2, final=True)
    assert per_token["bits_per_token"] == pytest.approx(1) and per_token["targets"] == 199
    assert (
        not {"bits_per_byte", "bytes", "bigram_bits_per_byte"} & per_token.keys()
        and per_token["bigram_bits_per_token"] > 3
    )
    for name in ("train.bin", "val.bin"):  # as bytes, letters
        (np.fromfile(folder / name, np.uint16) + 32).tofile(folder / name)
    per_byte = evaluate_text(losses, Text(source=str(folder), length=32, tokenizer="bytes"), 2, final=True)
    assert per_byte["bits_per_byte"] == pytest.approx(1) and per_byte["bytes"] == 199


def test_a_file_that_several_open_at_once_is_read_through_once(tmp_path, ids, monkeypatch):
    ids.tofile(tmp_path / "x.bin")
    reads, at_once = [], threading.Barrier(4)
    digest = token_files.file_sha256
    monkeypatch.setattr(token_files, "file_sha256", lambda path: (reads.append(path), digest(path))[1])

    def opened(number):
        at_once.wait()
        return open_token_files(str(tmp_path / "x.bin"), "uint16", END, None, None, None)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        corpora = list(threads.map(opened, range(4)))
    assert len(reads) == 1 and len({corpus.digest for corpus in corpora}) == 1
    assert [len(corpus.train) for corpus in corpora] == [19] * 4


@pytest.mark.parametrize(
    "write, fields, message",
    [
        (lambda path: path.write_bytes(b"abc"), {}, "3 bytes are not whole ids of uint16; data.token_type"),
        (
            lambda path: np.arange(999, dtype=np.uint32).tofile(path),
            {},
            "ids of 32 bits read as 16.*data.token_type=uint32",
        ),
        (
            lambda path: np.random.default_rng(0).integers(0, 65, 4000).astype(np.uint16).tofile(path),
            {"token_type": "uint32"},
            r"ids of 16 bits read as 32, two at a time \(one is 4,.*data.token_type=uint16",
        ),
        (
            lambda path: np.arange(99, dtype=np.uint16).tofile(path),
            {"tokenizer": "bytes"},
            "token ids of another tokenizer, as bytes 29% would be control characters",
        ),
        (lambda path: path.write_bytes(b""), {}, "holds 0 ids; at least two"),
        (lambda path: None, {}, "no such file; .npy and .bin are files of token ids"),
        (lambda path: np.arange(99, dtype=np.uint16).tofile(path), {"vocabulary_size": 50}, "holds the id 98"),
        (
            lambda path: np.arange(99, dtype=np.uint16).tofile(path),
            {"end_token": 99},
            "data.end_token=99: is nowhere in",
        ),
        (lambda path: np.arange(999, dtype=np.uint16).tofile(path), {"tokenizer": "bytes"}, "'bytes' has 257 ids"),
        (
            lambda path: np.arange(999, dtype=np.uint16).tofile(path),
            {"tokenizer": "bytes", "vocabulary_size": 1000},
            "'bytes' has 257 ids.*holds the id 998",
        ),
        (lambda path: np.arange(3, dtype=np.uint16).tofile(path), {}, "has too few ids held out"),
    ],
)
def test_a_bin_file_that_cannot_be_is_refused(tmp_path, write, fields, message):
    write(tmp_path / "x.bin")
    with pytest.raises(UserError, match=message):
        Text(source=str(tmp_path / "x.bin"), **fields).prepared()


def test_wide_ids_of_a_large_vocabulary_are_read(tmp_path):
    np.random.default_rng(0).integers(0, 200_000, 4000).astype(np.uint32).tofile(tmp_path / "x.bin")
    assert 199_000 < Text(source=str(tmp_path / "x.bin"), token_type="uint32").vocabulary <= 200_000


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((4, 4), np.int32), r"is int32 of shape \(4, 4\); token ids are a vector of integers"),
        (np.zeros(9), "is float64"),
        (np.array([3, -1, 2]), "holds the id -1"),
        (np.array([{}], dtype=object), "cannot be read without running code|can be read without running code"),
    ],
)
def test_an_array_that_is_no_vector_of_ids_is_refused(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        Text(source=str(tmp_path / "x.npy")).prepared()


def test_text_has_no_fields_of_token_files(tmp_path):
    with pytest.raises(UserError, match=r"is no file of token ids \(.npy, .bin\), which alone have token_type"):
        Text(source="stdlib", end_token=3).prepared()


def test_a_run_on_token_files_records_them_and_goes_on_where_they_moved(folder, tmp_path, capsys):
    run = f"run.directory={tmp_path / 'run'}"
    assert main(["train", "text.attention", *SMALL, f"data.source={folder}", run]) == 0
    assert "1,800 tokens to train on" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["bits_per_token"] > 4 and "bits_per_byte" not in result
    assert result["corpus"]["train"] == {"documents": 1, "tokens": 1800}
    assert main(["generate", str(tmp_path / "run"), "--prompt", "x"]) == 2
    assert "token ids without a tokenizer" in capsys.readouterr().err
    folder.rename(tmp_path / "elsewhere")
    moved = [f"data.source={tmp_path / 'elsewhere'}", run, "run.steps=4", "optimizer.schedule=constant"]
    assert main(["train", "text.attention", *SMALL, *moved]) == 2  # another schedule
    moved = [f"data.source={tmp_path / 'elsewhere'}", run, "run.steps=4"]
    assert main(["train", "text.attention", *SMALL, *moved]) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert main(["prepare", str(tmp_path / "elsewhere"), str(tmp_path / "out")]) == 2
    assert "token ids need no preparation; train with data.source=" in capsys.readouterr().err
