"""Corpora: split by document, digest, cache, what is refused, and never TensorFlow."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configuration import UserError
from data.corpora import corpus_digest, divide, local_documents, open_corpus, standard_library_files


def all_documents(corpus):
    return sorted([*corpus.train, *corpus.held_out])


def test_every_file_is_on_one_side(folder):
    corpus = open_corpus(str(folder))
    texts = sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert all_documents(corpus) == texts
    assert 1 <= len(corpus.held_out) <= 10 and len(corpus.train) + len(corpus.held_out) == 60
    assert corpus.train.byte_lengths.tolist() == [len(text) for text in corpus.train]
    facts = corpus.describe()
    assert facts["train"]["bytes"] + facts["held_out"]["bytes"] == sum(map(len, texts))
    json.dumps(facts)


def test_a_new_file_moves_no_other_to_the_other_side(folder):
    before = open_corpus(str(folder))
    (folder / "new.txt").write_text("something new")
    after = open_corpus(str(folder))
    assert after.digest != before.digest
    assert set(before.train) <= set(after.train) and set(before.held_out) <= set(after.held_out)


def test_share_held_out_is_a_twentieth():
    documents = [(f"file {index}", b"x") for index in range(4000)]
    train, held_out = divide(documents)
    assert sorted(train + held_out) == sorted(documents)
    assert abs(len(held_out) / 4000 - 0.05) < 0.015


def test_small_corpora_have_both_sides(tmp_path):
    for count in (2, 3):
        train, held_out = divide([(f"{index}", b"text") for index in range(count)])
        assert train and len(held_out) == 1
    lines = b"".join(b"line %d\n" % number for number in range(100))
    (tmp_path / "one.txt").write_bytes(lines)
    corpus = open_corpus(str(tmp_path / "one.txt"))
    assert corpus.train[0] + corpus.held_out[0] == lines
    assert corpus.train[0].endswith(b"\n") and 0.02 < len(corpus.held_out[0]) / len(lines) < 0.08
    whole = "ü" * 50  # no line break: the cut is between characters
    train, held_out = divide([("umlauts", whole.encode())])
    assert train[0][1].decode() + held_out[0][1].decode() == whole


def test_jsonl_and_what_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "zweite Ü", "id": 3}\n{"text": ""}\n')
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    assert dict(local_documents(tmp_path)) == {"a.jsonl:1": b"first", "a.jsonl:3": "zweite Ü".encode()}


@pytest.mark.parametrize("line", ["not json", '{"content": "x"}', '{"text": 3}', "[1]"])
def test_bad_lines_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: expected"):
        open_corpus(str(tmp_path))


def test_sources_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_corpus(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="there is no text in it"):
        open_corpus(str(tmp_path))
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    with pytest.raises(UserError, match="is not UTF-8"):
        open_corpus(str(tmp_path / "latin.txt"))
    (tmp_path / "tiny.txt").write_text("x")
    with pytest.raises(UserError, match="too few"):
        open_corpus(str(tmp_path / "tiny.txt"))
    with pytest.raises(UserError, match="TFDS has no such data set"):
        open_corpus("tfds:no_such_data_set_anywhere")
    with pytest.raises(UserError, match="no text feature, only image, label"):
        open_corpus("tfds:mnist")


def test_digest_covers_names_and_bytes_and_their_borders():
    digests = {corpus_digest(pairs) for pairs in ([("a", b"bc")], [("ab", b"c")], [("a", b"bd")], [("a", b"b"), ("c", b"")])}
    assert len(digests) == 4


class RecollectTestReviews(tfds.core.GeneratorBasedBuilder):
    """Twenty short reviews, found by name as TFDS's own data sets are."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = tfds.features.FeaturesDict({"label": tfds.features.Scalar(np.int64), "review": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(20):
            yield index, {"label": index, "review": f"review {index}"}


def test_tfds_data_sets_by_name():
    corpus = open_corpus("tfds:recollect_test_reviews")
    assert len(corpus.train) == 19 and len(corpus.held_out) == 1
    assert all_documents(corpus) == sorted(b"review %d" % index for index in range(20))
    assert open_corpus("tfds:recollect_test_reviews").digest == corpus.digest


def _open_and_report(folder, cache, queue):
    os.environ["RECOLLECT_CACHE"] = cache
    queue.put(len(open_corpus(folder).train))


def test_two_processes_may_prepare_at_once(folder, cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_open_and_report, args=(str(folder), str(cache), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    counts = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert counts == {len(open_corpus(str(folder)).train)}
    assert [path.name for path in (cache / "corpora").iterdir() if path.name.startswith(".")] == []


def test_second_preparation_removes_its_own_copy(folder, cache, monkeypatch):
    """The race itself: another process finishes while this one prepares."""
    import shutil

    from data import corpora

    finished = open_corpus(str(folder)).folder
    marker = finished / "first"
    marker.touch()
    corpora._prepare(corpora.LocalText, list(local_documents(folder)), finished)
    assert marker.exists() and list((cache / "corpora").iterdir()) == [finished]
    shutil.rmtree(finished)
    assert len(open_corpus(str(folder)).train) > 0


def test_tensorflow_is_never_imported(tmp_path, folder):
    """A TensorFlow that leaves a mark when imported stands first on the path."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    program = (
        "import sys; from data.text import Text\n"
        f"text = Text(source={str(folder)!r}, length=64)\n"
        "text.batches(0, 2).read(0, 0, 2); next(text.evaluation_batches(2))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()
    assert "Unknown size" not in done.stdout


def test_standard_library():
    files = dict(standard_library_files())
    assert files["json/decoder.py"].startswith(b'"""Implementation of JSONDecoder')
    assert not any({"tests", "test", "site-packages", "__pycache__"} & set(name.split("/")) for name in files)
    corpus = open_corpus("stdlib")
    assert all_documents(corpus) == sorted(files.values())
    assert corpus.digest == corpus_digest(list(files.items()))
    assert 8e6 < sum(map(len, files.values())) < 2e7
