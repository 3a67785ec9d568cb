"""Formats: text is read however it is packed, encoded and listed; what cannot be known is counted or refused."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest
from pyarrow import parquet

from recollect.data.text.preparation.formats import Readable, Refusal, recognise
from recollect.data.text.preparation.json_items import json_items
from tests.data.text.preparation.prepared_folders import (
    all_texts_of,
    prepare_command,
    refused,
    texts_of,
    write_lines,
)


def zstandard(raw):
    return pa.Codec("zstd").compress(raw, asbytes=True)


PACKED = {".gz": gzip.compress, ".zst": zstandard, ".bz2": bz2.compress, ".xz": lzma.compress}
TWO = [b"first text", b"second text"]
LINES = b"".join(json.dumps({"text": text.decode()}).encode() + b"\n" for text in TWO)
ARRAY = json.dumps([{"text": text.decode()} for text in TWO]).encode()


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize(
    ("name", "raw"), [("a.jsonl", LINES), ("a.json", LINES), ("a.json", ARRAY), ("a.txt", b"first text\nsecond text\n")]
)
def test_packed_files_are_read(tmp_path, capsys, suffix, name, raw):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"{name}{suffix}").write_bytes(PACKED[suffix](raw))
    (tmp_path / "in" / "README.md").write_text("# About these data")
    code, shown, errors = prepare_command(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 0, errors
    expected = [b"first text\n", b"second text\n"] if name == "a.txt" else TWO
    assert all_texts_of(tmp_path / "out") == (expected if name != "a.txt" else sorted(expected))
    assert "left out: 1 file (18 bytes), metadata: README.md" in shown


def test_the_same_packed_texts_are_the_same_corpus_in_chunks(tmp_path, monkeypatch):
    from recollect.data.tokenizers import text_chunks

    monkeypatch.setattr(text_chunks, "CHUNK_BYTES", 7)
    raw = "naïve ☃\n\nline two is longer\nend 𝄞".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    whole = list(text_chunks.file_chunks(tmp_path / "a.txt", 0, len(raw)))
    with open(tmp_path / "a.txt", "rb") as file:
        assert list(text_chunks.stream_chunks(file)) == whole == list(text_chunks.text_chunks(raw))
    with open(tmp_path / "a.txt", "rb") as file:
        assert b"".join(text_chunks.stream_chunks(file, 10)) == raw[:10]


@pytest.mark.parametrize(
    "raw", [LINES, ARRAY, json.dumps([text.decode() for text in TWO]).encode(), b"\xef\xbb\xbf" + LINES]
)
def test_json_named_so_is_never_text_itself(tmp_path, capsys, raw):
    (tmp_path / "a.json").write_bytes(raw)
    assert prepare_command(capsys, tmp_path / "a.json", tmp_path / "out")[0] == 0
    assert all_texts_of(tmp_path / "out") == TWO


def test_json_lines_without_a_suffix_are_known_by_their_content(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "wiki_00").write_bytes(LINES)
    (tmp_path / "in" / "notes").write_text('{"other": 3} is no line of JSON')
    assert prepare_command(capsys, tmp_path / "in", tmp_path / "out")[0] == 0
    assert all_texts_of(tmp_path / "out") == sorted([*TWO, b'{"other": 3} is no line of JSON'])


def test_settings_as_json_are_left_out_and_named(tmp_path, capsys):
    source = tmp_path / "in"
    write_lines(source / "a.jsonl", "one", "two")
    (source / "config.json").write_text('{"width": 3}')
    (source / "pretty.json").write_text(json.dumps({"text": "a text"}, indent=2))
    (source / "other.json").write_text(json.dumps({"vocab": {"a": 1}}, indent=2))
    code, shown, _ = prepare_command(capsys, source, tmp_path / "out")
    assert code == 0 and all_texts_of(tmp_path / "out") == [b"a text", b"one", b"two"]
    size = sum((source / name).stat().st_size for name in ("config.json", "other.json"))
    assert f"left out: 2 files ({size} bytes), JSON without a string 'text': first config.json" in shown
    assert "--field names another key" in refused(capsys, source, tmp_path / "strict", "--strict")
    (source / "broken.json").write_text("{'text': 'python, not JSON'}")
    assert "broken.json: is neither a JSON array nor JSON lines" in refused(capsys, source, tmp_path / "other")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_texts_with_a_byte_order_mark_are_read_without_it(tmp_path, capsys, encoding, packed):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(packed("naïve ☃".encode(encoding)))
    (tmp_path / "in" / "b.jsonl").write_bytes(packed(LINES.decode().encode(encoding)))
    code, shown, _ = prepare_command(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 0 and "left out" not in shown
    assert all_texts_of(tmp_path / "out") == sorted([*TWO, "naïve ☃".encode()])


def test_what_is_not_utf8_is_counted_and_named_and_can_be_read(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("plain text")
    (source / "b.txt").write_text("more of it")
    (source / "latin.txt").write_bytes("über\n".encode("latin-1"))
    (source / "one_bad_byte.txt").write_bytes(b"x" * 3_000_000 + b"\xff" + b"y" * 3_000_000)
    (source / "half.txt").write_bytes("odd".encode("utf-16")[:-1])
    code, shown, _ = prepare_command(capsys, source, tmp_path / "out")
    assert code == 0 and all_texts_of(tmp_path / "out") == [b"more of it", b"plain text"]
    line = next(line for line in shown.splitlines() if "not UTF-8" in line)
    assert line.startswith("left out: 3 files (6,000,013 bytes), not UTF-8: first half.txt") and "utf-16" in line
    (source / "half.txt").unlink()
    line = refused(capsys, source, tmp_path / "strict", "--strict")
    assert "2 files (6,000,006 bytes), not UTF-8: first latin.txt: byte 0xfc at 0; --encoding" in line
    assert not (tmp_path / "strict").exists()
    (source / "one_bad_byte.txt").unlink()
    assert prepare_command(capsys, source, tmp_path / "read", "--encoding", "latin-1", "--strict")[0] == 0
    assert "über\n".encode() in all_texts_of(tmp_path / "read")
    assert "no such text encoding" in refused(capsys, source, tmp_path / "x", "--encoding", "rot13")
    assert "no such text encoding" in refused(capsys, source, tmp_path / "x", "--encoding", "klingon")


def test_what_is_no_text_is_named(tmp_path):
    cases = {
        "picture.txt": (b"\x89PNG\r\n\x1a\n\0\0", "not text but binary"),
        "paper.pdf": (b"%PDF-1.7 ...", "not text but a PDF"),
        "texts.zip": (b"PK\x03\x04....", "not text but an archive, which has to be unpacked"),
        "texts.tar.gz": (gzip.compress(b"x" * 257 + b"ustar" + b"y" * 90), "not text but an archive, which has to be"),
        "a.parquet": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of Git LFS, not the file",
        ),
        "empty.txt": (b"", "empty"),
        "empty.txt.gz": (gzip.compress(b""), "empty"),
    }
    for name, (raw, reason) in cases.items():
        (tmp_path / name).write_bytes(raw)
        how = recognise(tmp_path / name, "text")
        assert isinstance(how, Refusal) and how.reason.startswith(reason), name
    (tmp_path / "BZhou").write_text("BZhou is a name")
    assert recognise(tmp_path / "BZhou", "text") == Readable("text")


def test_damaged_packed_files_end_the_preparation(tmp_path, capsys):
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(300))
    for suffix, pack in PACKED.items():
        source = tmp_path / f"in{suffix}"
        source.mkdir()
        (source / f"a.jsonl{suffix}").write_bytes(pack(lines)[:-9])
        line = refused(capsys, source, tmp_path / "out")
        assert f"a.jsonl{suffix}" in line and "cannot be unpacked" in line
        (source / f"a.jsonl{suffix}").write_bytes(lines)
        assert "as its name says" in refused(capsys, source, tmp_path / "out2")


def test_tables_and_code_are_read_when_asked_for(tmp_path, capsys):
    source = tmp_path / "in"
    write_lines(source / "a.jsonl", "one", "two")
    (source / "b.csv").write_text('id,text\n1,"three\nlines, quoted"\n2,\n3,four\n')
    (source / "c.tsv").write_text('text\tid\n"quoted"\t3\n')
    (source / "d.py").write_text("print('five')\n")
    code, shown, _ = prepare_command(capsys, source, tmp_path / "out")
    assert code == 0 and all_texts_of(tmp_path / "out") == [b"one", b"two"]
    size = sum((source / name).stat().st_size for name in ("b.csv", "c.tsv"))
    assert f"left out: 2 files ({size} bytes), tables, which have to be asked for: first b.csv: --include" in shown
    assert (
        "left out: 1 file (14 bytes), code, markup and settings, which have to be asked for: d.py: --include" in shown
    )
    include = ("--include", "*.csv", "--include", "c.tsv", "--include", "*.py", "--strict")
    code, shown, _ = prepare_command(capsys, source, tmp_path / "all", *include)
    assert code == 0 and "without text: 1 row, the first b.csv:2" in shown and "left out" not in shown
    expected = [b"three\nlines, quoted", b"four", b"quoted", b"print('five')\n", b"one", b"two"]
    assert all_texts_of(tmp_path / "all") == sorted(expected)
    assert prepare_command(capsys, source / "b.csv", tmp_path / "named")[0] == 0  # naming a file asks for it
    assert "matches no file" in refused(capsys, source, tmp_path / "x", "--include", "*.cvs")
    assert "has no column 'body', only id, text" in refused(capsys, source / "b.csv", tmp_path / "x", "--field", "body")
    (source / "b.csv").write_text("text,text\n1,2\n")
    assert "has 2 columns 'text'" in refused(capsys, source / "b.csv", tmp_path / "x")
    (source / "b.csv").write_text('id,text\n1\n2,"\n')
    assert "row 1: has 1 columns" in refused(capsys, source / "b.csv", tmp_path / "x")
    code, _, _ = prepare_command(capsys, source, tmp_path / "less", "--exclude", "*.csv", "--exclude", "*.tsv")
    assert code == 0 and texts_of(tmp_path / "less") == texts_of(tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_are_read(tmp_path, capsys, kind):
    table = pa.table({"id": [1, 2, 3], "text": ["one", None, "three"]})
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    code, shown, _ = prepare_command(capsys, tmp_path / "a.arrow", tmp_path / "out")
    assert code == 0 and "without text: 1 row, the first a.arrow:2" in shown
    assert all_texts_of(tmp_path / "out") == [b"one", b"three"]
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-300])
    assert "a.arrow" in refused(capsys, tmp_path / "a.arrow", tmp_path / "x")
    (tmp_path / "a.arrow").write_bytes(b"nothing of the kind")
    assert "a.arrow: is no Arrow file" in refused(capsys, tmp_path / "a.arrow", tmp_path / "x")


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.json", NESTED),
        ("a.json", '{"text": ' + NESTED),
        ("a.json", '[{"text": "fine"}, {"text": ' + NESTED),
        ("a.jsonl", '{"text": "fine"}\n{"text": ' + NESTED + "\n"),
        ("b.json", '[{"text": "cut off"}, {"te'),
        ("b.json", '[{"text": "no comma"} {"text": "x"}]'),
        ("b.json", '[{"text": "more"}] x'),
        ("b.json", '[{"other": "x"}]'),
        ("b.json", "[3]"),
    ],
)
def test_json_that_cannot_be_read_is_one_line(tmp_path, capsys, name, raw):
    (tmp_path / name).write_text(raw)
    assert name in refused(capsys, tmp_path / name, tmp_path / "out")


def test_items_of_arrays_come_one_by_one(tmp_path):
    class Slow:
        """A file that is read a few bytes at a time."""

        def __init__(self, raw):
            self.raw = raw

        def read(self, size):
            block, self.raw = self.raw[:3], self.raw[3:]
            return block

    values = [{"text": "naïve ☃"}, "x", 12345, [1, [2]], None, True]
    assert list(json_items(Slow(json.dumps(values, ensure_ascii=False).encode()))) == values
    assert list(json_items(Slow(b" [ ] \n"))) == [] and list(json_items(Slow(b"12 "))) == [12]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, None, None]),
        pa.array(["one", None, "two"]).dictionary_encode(),
        pa.array(["one", None, "two"], pa.string_view()),
        pa.array(["one", "", "two"], pa.large_string()),
    ],
    ids=["null", "dictionary", "string_view", "large_string"],
)
def test_nulls_are_no_text_in_every_kind_of_column(tmp_path, capsys, column):
    source = tmp_path / "in"
    write_lines(source / "b.jsonl", "three", None, "")
    (source / "c.json").write_text(json.dumps([{"text": None}, {"text": "four"}, ""]))
    parquet.write_table(pa.table({"text": column}), source / "a.parquet")
    code, shown, errors = prepare_command(capsys, source, tmp_path / "out")
    assert code == 0, errors
    empty = sum(text in (None, "") for text in column.to_pylist())
    first = "a.parquet:1" if empty == 3 else "a.parquet:2"
    assert f"without text: {empty + 4} rows, the first {first}" in shown
    assert all_texts_of(tmp_path / "out") == sorted([b"three", b"four", *([] if empty == 3 else [b"one", b"two"])])


def test_two_columns_of_one_name_are_refused_by_name(tmp_path, capsys):
    parquet.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    assert "a.parquet: has 2 columns 'text'" in refused(capsys, tmp_path / "a.parquet", tmp_path / "out")
