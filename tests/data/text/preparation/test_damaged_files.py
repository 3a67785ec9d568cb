"""Damaged files of every format end with code 0 or 2 and one line, whatever is damaged, and write into OUT alone."""

import bz2
import gzip
import io
import json
import lzma
import random
import struct

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.data.text.preparation.prepared_folders import files, prepare_command, refused

LINES = b"".join(json.dumps({"text": f"text {number} naïve"}).encode() + b"\n" for number in range(30))
TABLE = pa.table({"text": ["one", "two", None, "three" * 20], "n": [1, 2, 3, 4]})


def arrow(new, table=TABLE):
    buffer = io.BytesIO()
    with new(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def parquet_bytes():
    buffer = io.BytesIO()
    parquet.write_table(TABLE, buffer)
    return buffer.getvalue()


CARD = b"---\nconfigs:\n- data_files:\n  - split: train\n    path: '*.jsonl'\n---\n"
WHOLE = {
    "a.jsonl": LINES,
    "b.json": json.dumps([{"text": "one"}, {"text": None}, "two"]).encode(),
    "c.txt": "naïve ☃\n".encode("utf-16"),
    "d.parquet": parquet_bytes(),
    "e.arrow": arrow(pa.ipc.new_file),
    "f.arrow": arrow(pa.ipc.new_stream),
    "g.csv": b'id,text\n1,one\n2,"two\nlines"\n',
    "h.jsonl.gz": gzip.compress(LINES),
    "i.jsonl.zst": pa.Codec("zstd").compress(LINES, asbytes=True),
    "j.txt.bz2": bz2.compress(LINES),
    "k.txt.xz": lzma.compress(LINES),
    "test.jsonl": LINES,
    "README.md": CARD,
    "state.json": b'{"_data_files": [{"filename": "e.arrow"}]}',
}
OPTIONS = ["--strict", "--encoding=latin-1", "--encoding=utf-16", "--held-out=0.3", "--include=*.csv", "--field=n"]


def damaged(raw, draw):
    raw = bytearray(raw)
    if draw.random() < 0.5:
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        return bytes(raw)
    return bytes(raw[: draw.randrange(len(raw))]) if draw.random() < 0.7 else bytes(raw)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_one_line(tmp_path, capsys, seed):
    draw, codes = random.Random(seed), set()
    for number in range(12):
        source, out = tmp_path / f"in{number}", tmp_path / f"out{number}"
        source.mkdir()
        for name in draw.sample(sorted(WHOLE), draw.randint(1, 5)):
            content = WHOLE[name if draw.random() < 0.7 else draw.choice(sorted(WHOLE))]
            (source / name).write_bytes(damaged(content, draw))
        before = files(source)
        code, _, errors = prepare_command(capsys, source, out, *(text for text in OPTIONS if draw.random() < 0.1))
        assert code in (0, 2) and len(errors) == (code == 2)
        assert files(source) == before and {path.name for path in tmp_path.iterdir()} <= {
            f"{word}{count}" for word in ("in", "out") for count in range(number + 1)
        }
        codes.add(code)
    assert 2 in codes


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_offsets_of_an_arrow_file_that_lead_out_of_it_are_an_error(tmp_path, capsys, new):
    raw = arrow(new, pa.table({"text": ["one", "two"]}))
    offsets = struct.pack("<3i", 0, 3, 6)
    assert raw.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(raw.replace(offsets, struct.pack("<3i", 0, 2**30, 6)))
    assert "a.arrow, near row 1: cannot be read" in refused(capsys, tmp_path / "a.arrow", tmp_path / "out")


def test_columns_whose_names_are_no_text_are_an_error(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes().replace(b"text", b"te\xa9t"))
    assert "a.parquet: is no parquet file" in refused(capsys, tmp_path / "a.parquet", tmp_path / "out")


def test_an_encoding_that_the_text_is_not_in_either_is_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xe4 without a mark")
    line = refused(capsys, tmp_path / "a.txt", tmp_path / "out", "--encoding", "utf-16")
    assert "not UTF-8: a.txt: byte 0xe4 at 0; nor utf-16" in line
