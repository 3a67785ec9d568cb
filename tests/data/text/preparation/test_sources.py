"""Sources: which documents there are and where they go, how the work is cut, and what is refused."""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from recollect.configuration import UserError
from recollect.data.text.preparation.documents import read_documents
from recollect.data.text.preparation.listing import LeftOut, Selection
from recollect.data.text.preparation.prepare import Preparation
from recollect.data.text.preparation.reader import open_prepared
from recollect.data.text.preparation.sources import open_source, split_of
from recollect.data.tokenizers.text_chunks import CHUNK_BYTES, character_border, text_chunks


def documents_of(source, **options):
    """{split: {name: bytes}} of a source, parts of a document joined."""
    division = open_source(str(source), **options).division
    found = {"train": {}, "held_out": {}}
    for part in (part for parts in division.tasks for part in parts):
        for document in read_documents(part):
            texts = found[split_of(part, document.name, division.held_out_bound)]
            assert (document.name in texts) == part.continues
            texts[document.name] = texts.get(document.name, b"") + b"".join(document.chunks)
    return found


def all_documents(source, **options):
    found = documents_of(source, **options)
    assert not found["train"].keys() & found["held_out"].keys() and found["train"] and found["held_out"]
    return found["train"] | found["held_out"]


def test_every_file_is_on_one_side_wherever_tasks_are_cut(folder):
    texts = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    whole = documents_of(folder)
    assert whole["train"] | whole["held_out"] == texts and 1 <= len(whole["held_out"]) <= 10
    for shard_bytes in (20, 500, 5000):
        assert documents_of(folder, shard_bytes=shard_bytes) == whole
    assert len(open_source(str(folder), shard_bytes=5000).division.tasks) == pytest.approx(
        sum(map(len, texts.values())) / 5000, abs=3
    )


def test_a_new_file_moves_no_other_to_the_other_side(folder):
    before, fingerprint = documents_of(folder), open_source(str(folder)).fingerprint
    (folder / "new.txt").write_text("something new")
    after = documents_of(folder)
    assert open_source(str(folder)).fingerprint != fingerprint
    assert all(before[split].items() <= after[split].items() for split in before)


def test_share_held_out_is_a_twentieth(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(4000)))
    assert abs(len(documents_of(tmp_path / "a.jsonl")["held_out"]) / 4000 - 0.05) < 0.015


@pytest.mark.parametrize("count", [2, 3])
def test_few_documents_have_both_sides(tmp_path, count):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(count)))
    found = documents_of(tmp_path)
    assert len(found["held_out"]) == 1 and len(found["train"]) == count - 1


@pytest.mark.parametrize("shard_bytes", [None, 100])
def test_one_text_is_divided_at_a_line_break(tmp_path, shard_bytes):
    lines = b"".join(b"line %d\n" % number for number in range(100))
    (tmp_path / "one.txt").write_bytes(lines)
    found = documents_of(tmp_path / "one.txt", shard_bytes=shard_bytes)
    train, held_out = found["train"]["one.txt:train"], found["held_out"]["one.txt:held_out"]
    assert train + held_out == lines and train.endswith(b"\n") and 0.02 < len(held_out) / len(lines) < 0.08


@pytest.mark.parametrize("shard_bytes", [None, 7])
def test_a_text_without_lines_is_cut_between_characters(tmp_path, shard_bytes):
    (tmp_path / "umlauts.txt").write_text("ü☃" * 20)
    found = documents_of(tmp_path, shard_bytes=shard_bytes)
    train, held_out = found["train"]["umlauts.txt:train"], found["held_out"]["umlauts.txt:held_out"]
    assert (train + held_out).decode() == "ü☃" * 20 and held_out.decode()
    division = open_source(str(tmp_path), shard_bytes=shard_bytes).division
    for part in (part for parts in division.tasks for part in parts):
        assert b"".join(next(read_documents(part)).chunks).decode()


def test_long_texts_stream_in_whole_characters_and_lines():
    random = np.random.default_rng(0)
    lines = "\n".join(
        "ü☃𝄞a"[k] * int(n) for k, n in zip(random.integers(0, 4, 4000), random.integers(1, 900, 4000), strict=True)
    )
    for text in (lines, lines.replace("\n", "")):
        parts = list(text_chunks(text.encode()))
        assert len(parts) > 1 and max(map(len, parts)) <= CHUNK_BYTES
        assert "".join(part.decode() for part in parts) == text
        assert all(part.endswith(b"\n") for part in parts[:-1]) == ("\n" in text)
    assert list(text_chunks(b"")) == [] and b"".join(text_chunks(b"\x80" * (CHUNK_BYTES + 5))) == b"\x80" * (
        CHUNK_BYTES + 5
    )


def test_a_border_never_splits_a_character():
    text = "aü☃𝄞".encode()
    borders = {0, 1, 3, 6, 10}
    for at in range(1, len(text) + 1):
        assert character_border(text, at) == max(border for border in borders if border <= at)


def write_formats(root):
    """A file of each kind; returns the documents that they hold, by name."""
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("plain ☃")
    (root / "deep" / "b.md").write_text("# mark")
    (root / "c.jsonl").write_text(
        '{"text": "first"}\n\n{"text": "zweite Ü", "id": 3}\n{"text": ""}\n{"text": "broken \\ud800"}'
    )
    with gzip.open(root / "deep" / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n{"text": "again"}\n')
    table = pa.table({"text": ["row one", None, "", "row four", "row five"], "other": [1, 2, 3, 4, 5]})
    parquet.write_table(table, root / "e.parquet", row_group_size=2)
    (root / "binary.bin").write_bytes(b"\xff\xfe\x00")
    (root / ".hidden").write_text("hidden")
    (root / "empty.txt").write_text("")
    (root / "empty.jsonl").write_text("")
    (root / "late.txt").write_bytes(b"x" * (CHUNK_BYTES + 1) + b"\xff")
    return {
        "a.txt": "plain ☃".encode(),
        "deep/b.md": b"# mark",
        "c.jsonl:1": b"first",
        "c.jsonl:3": "zweite Ü".encode(),
        "c.jsonl:5": b"broken ?",
        "deep/d.jsonl.gz:1": b"packed",
        "deep/d.jsonl.gz:2": b"again",
        "e.parquet:1": b"row one",
        "e.parquet:4": b"row four",
        "e.parquet:5": b"row five",
    }


@pytest.mark.parametrize("shard_bytes", [None, 10])
def test_every_format_in_one_folder(tmp_path, shard_bytes):
    expected = write_formats(tmp_path / "mixed")
    assert all_documents(tmp_path / "mixed", shard_bytes=shard_bytes) == expected


def test_long_jsonl_is_cut_between_lines_and_keeps_their_numbers(tmp_path):
    lines = [json.dumps({"text": "x" * (number % 70) + "y"}) if number % 5 else "" for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert len(open_source(str(tmp_path), shard_bytes=500).division.tasks) > 10
    assert all_documents(tmp_path, shard_bytes=500) == all_documents(tmp_path)
    assert set(all_documents(tmp_path)) == {f"a.jsonl:{number + 1}" for number in range(300) if number % 5}


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    parquet.write_table(pa.table({"body": ["three"]}), tmp_path / "b.parquet")
    assert sorted(all_documents(tmp_path, field="body").values()) == [b"one", b"three", b"two"]
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: expected a JSON object with a string 'text'"):
        documents_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("line", ["not json", '{"content": "x"}', '{"text": 3}', "[1]", '{"text": "\udcff"}'])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_lines_are_named(tmp_path, line, suffix):
    raw = ('{"text": "fine"}\n' + line).encode("utf-8", "surrogateescape")
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    with pytest.raises(UserError, match=rf"a\{suffix}, line 2: expected"):
        documents_of(tmp_path)


def test_damaged_files_are_named(tmp_path):
    packed = gzip.compress(b'{"text": "fine"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz, after line \d+: cannot be unpacked"):
        documents_of(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"no\.parquet: is no parquet file"):
        documents_of(tmp_path / "no.parquet")
    parquet.write_table(pa.table({"text": [1, 2], "words": ["a", "b"]}), tmp_path / "numbers.parquet")
    with pytest.raises(UserError, match=r"numbers\.parquet: column 'text' holds int64"):
        documents_of(tmp_path / "numbers.parquet")
    with pytest.raises(UserError, match="has no column 'body', only text, words"):
        documents_of(tmp_path / "numbers.parquet", field="body")


def test_sources_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        documents_of(tmp_path / "missing")
    with pytest.raises(UserError, match="there is no text in it"):
        documents_of(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    with pytest.raises(UserError, match=r"latin\.txt.: there is no UTF-8 text in it"):
        documents_of(tmp_path / "latin.txt")
    (tmp_path / "tiny.txt").write_text("x")
    with pytest.raises(UserError, match="too few"):
        documents_of(tmp_path / "tiny.txt")
    (tmp_path / "one.jsonl").write_text('{"text": "alone"}')
    with pytest.raises(UserError, match="has one document"):
        documents_of(tmp_path / "one.jsonl")
    with pytest.raises(UserError, match="shard_bytes=0"):
        open_source("stdlib", shard_bytes=0)
    with pytest.raises(UserError, match="TFDS has no such data set"):
        open_source("tfds:no_such_data_set_anywhere")
    with pytest.raises(UserError, match="no text feature, only image, label"):
        open_source("tfds:mnist")


@pytest.mark.parametrize("name", ["c4/en", "wikipedia/20230601.en"])
def test_data_sets_that_tfds_hides_without_tensorflow_are_found(name):
    with pytest.raises(UserError, match="TFDS makes this data set with Apache Beam"):
        open_source(f"tfds:{name}")


def test_fingerprint_covers_names_and_bytes(tmp_path):
    found = set()
    for number, files in enumerate(({"a": "bc"}, {"ab": "c"}, {"a": "bd"}, {"a": "b", "c": ""})):
        root = tmp_path / str(number)
        root.mkdir()
        for name, text in files.items():
            (root / name).write_text(text)
        found.add(open_source(str(root)).fingerprint)
    assert len(found) == 4


class RecollectTestReviews(tfds.core.GeneratorBasedBuilder):
    """Twenty short reviews, found by name as TFDS's own data sets are; its configuration "tested" has a test split
    too."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain"), tfds.core.BuilderConfig(name="tested")]  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict({"label": tfds.features.Scalar(np.int64), "review": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        tested = {"test": self._generate_examples("test")} if self.builder_config.name == "tested" else {}
        return {"train": self._generate_examples("review")} | tested

    def _generate_examples(self, word):
        for index in range(20):
            yield index, {"label": index, "review": f"{word} {index}"}


def bytes_of_the_test_split(folder):
    return tfds.builder_from_directory(folder).info.splits["test"].num_bytes


def test_tfds_data_sets_by_name_config_and_folder(cache, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    found = documents_of("tfds:recollect_test_reviews", shard_bytes=100)
    reviews = sorted(b"review %d" % index for index in range(20))
    assert sorted((found["train"] | found["held_out"]).values()) == reviews and found["held_out"]
    tested = documents_of("tfds:recollect_test_reviews/tested")
    assert sorted(tested["train"].values()) == reviews
    assert sorted(tested["held_out"].values()) == sorted(b"test %d" % index for index in range(20))
    path = next((cache / "tfds").glob("recollect_test_reviews/tested/*"))
    assert documents_of(f"tfds:{path}") == tested
    assert not list((tmp_path / "temporary").iterdir())  # TFDS leaves folders there by itself
    assert open_source(f"tfds:{path}").fingerprint == open_source("tfds:recollect_test_reviews/tested").fingerprint
    out = cache / "out"
    Preparation("tfds:recollect_test_reviews/tested", shard_bytes=100).into(out, processes=2)
    found = open_prepared(str(out))
    for part, split in ((found.train, "train"), (found.held_out, "held_out")):
        assert [part.text(number) for number in range(len(part))] == list(tested[split].values())
    test = LeftOut("test", bytes_of_the_test_split(path), "the test split", "--held-out test takes it", lost=False)
    share = open_source("tfds:recollect_test_reviews/tested", selection=Selection(held_out="0.5")).division
    assert share.held_out_bound == 0.5 and share.left_out == [test] and [file.name for file in share.read] == ["train"]
    named = open_source("tfds:recollect_test_reviews/tested", selection=Selection(held_out="test"))
    assert named.division.tasks == open_source("tfds:recollect_test_reviews/tested").division.tasks
    with pytest.raises(UserError, match="is no share and no split"):
        open_source("tfds:recollect_test_reviews/tested", selection=Selection(held_out="validation"))
    with pytest.raises(UserError, match="it takes --held-out alone"):
        open_source("tfds:recollect_test_reviews/tested", selection=Selection(include=("*.csv",)))
    with pytest.raises(UserError, match="has no text feature 'label', only review"):
        open_source("tfds:recollect_test_reviews", field="label")
    with pytest.raises(UserError, match="is no folder of a TFDS data set"):
        open_source(f"tfds:{os.fspath(cache)}")


def test_standard_library():
    found = all_documents("stdlib")
    assert found["json/decoder.py"].startswith(b'"""Implementation of JSONDecoder')
    assert not any({"tests", "test", "site-packages", "__pycache__"} & set(name.split("/")) for name in found)
    assert 8e6 < sum(map(len, found.values())) < 2e7


def test_the_standard_library_of_two_builds_of_one_version_is_one_corpus(tmp_path, monkeypatch):
    """What a build writes into it, its paths and flags, and what an installation adds is not read."""
    prints = []
    for build in ("one", "two"):
        for name, text in {
            "json/decoder.py": "import re\n",
            "abc.py": "class ABC: pass\n",
            "_sysconfigdata__linux_x86_64-linux-gnu.py": f"build_time_vars = {{'prefix': '/{build}'}}\n",
            "config-3.11-x86_64-linux-gnu/python-config.py": f"#!/{build}/bin/python3.11\n",
            "sitecustomize.py": f"# {build}\n",
        }.items():
            (tmp_path / build / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / build / name).write_text(text)
        monkeypatch.setattr("sysconfig.get_path", lambda name, build=build: str(tmp_path / build))
        source = open_source("stdlib")
        prints.append((source.fingerprint, [file.name for file in source.division.read]))
    assert prints[0] == prints[1] and prints[0][1] == ["abc.py", "json/decoder.py"]
