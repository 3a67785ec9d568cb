"""Files of a folder: links are followed once, and what cannot be looked at ends the preparation with its name."""

import gzip
import io
import os
import random
from pathlib import Path

import pytest

from recollect.configuration import UserError
from recollect.data.text.preparation.file_tree import files_below
from recollect.data.text.preparation.prepare import Preparation
from tests.data.text.preparation.prepared_folders import all_texts_of, prepare_command, refused


def names_below(folder, **options):
    return [file.name for file in files_below(folder, **options)]


def test_linked_folders_are_followed_once_and_loops_end(tmp_path, capsys):
    source, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (source / "real").mkdir(parents=True)
    (elsewhere / "inner").mkdir(parents=True)
    (source / "real" / "a.txt").write_text("a text")
    (elsewhere / "inner" / "b.txt").write_text("a linked text")
    (source / "again").symlink_to(source / "real")
    (source / "linked").symlink_to(elsewhere)
    (source / "linked_twice").symlink_to(elsewhere / "inner")
    (elsewhere / "back").symlink_to(source)
    (elsewhere / "up").symlink_to(tmp_path)
    (source / "real" / "loop").symlink_to(source)
    (source / "file.txt").symlink_to(elsewhere / "inner" / "b.txt")
    (source / "broken.txt").symlink_to(tmp_path / "nowhere")
    names = names_below(source)
    assert "real/a.txt" in names and len(names) == 3 and len(names) == len(set(names))
    code, shown, _ = prepare_command(capsys, source, tmp_path / "out")
    assert code == 0 and all_texts_of(tmp_path / "out") == [b"a linked text", b"a text"]
    assert "left out: 1 file (0 bytes), a link to nothing: broken.txt" in shown


def test_what_is_no_file_is_left_out_without_waiting_for_it(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for name in "ab":
        (source / f"{name}.txt").write_text(f"text {name}")
    os.mkfifo(source / "pipe.txt")
    code, shown, _ = prepare_command(capsys, source, tmp_path / "out")
    assert code == 0 and "neither a file nor a folder: pipe.txt" in shown


def test_names_that_are_not_utf8_are_written_with_escapes(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for raw in (b"\xe4.txt", b"b.txt", b"\xe5.jsonl", b"\xe6.txt.gz"):
        text = b'{"text": "some"}\n'
        with open(os.fsencode(source) + b"/" + raw, "wb") as file:
            file.write(gzip.compress(text) if raw.endswith(b"gz") else text)
    code, shown, errors = prepare_command(capsys, source, tmp_path / "out")
    assert code == 0, errors
    assert names_below(source) == ["\\xe4.txt", "\\xe5.jsonl", "\\xe6.txt.gz", "b.txt"] and "first \\xe4.txt" in shown
    assert len(all_texts_of(tmp_path / "out")) == 4


def test_deep_folders_are_read(tmp_path):
    folder = tmp_path
    for _ in range(400):
        folder = folder / "a"
    folder.mkdir(parents=True)
    (folder / "x.txt").write_text("deep down")
    assert names_below(tmp_path) == ["a/" * 400 + "x.txt"]


def denied(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_an_unreadable_folder_is_named_and_can_be_left_out(tmp_path, capsys, monkeypatch):
    source = tmp_path / "in"
    (source / "private").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "private/c.txt"):
        (source / name).write_text(name)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: denied(path) if str(path).endswith("private") else scandir(path))
    line = refused(capsys, source, tmp_path / "out")
    assert "private: the folder cannot be read (Permission denied); --exclude 'private/*' leaves it out" in line
    assert prepare_command(capsys, source, tmp_path / "out", "--exclude", "private/*")[0] == 0
    assert all_texts_of(tmp_path / "out") == [b"a.txt", b"b.txt"]


@pytest.mark.parametrize("opened", ["FileIO", "stat"])
def test_an_unreadable_file_is_named(tmp_path, capsys, monkeypatch, opened):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.txt", "b.txt", "closed.txt"):
        (source / name).write_text(name)
    if opened == "FileIO":
        real = io.FileIO
        monkeypatch.setattr(io, "FileIO", lambda path: denied(path) if str(path).endswith("closed.txt") else real(path))
    else:
        stat = Path.stat

        def fail(self, **options):
            return denied(self) if self.name == "closed.txt" else stat(self, **options)

        monkeypatch.setattr(Path, "stat", fail)
    assert "closed.txt: cannot be read" in (line := refused(capsys, source, tmp_path / "out")), line
    assert "Permission denied" in line
    with pytest.raises(UserError, match="Not a directory"):
        files_below(source / "a.txt")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, suffix):
    source = tmp_path / "in"
    source.mkdir()
    for name in "ab":
        raw = random.Random(name).randbytes(3000).hex().encode()
        (source / f"{name}.txt{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    preparation = Preparation(str(source))
    assert preparation.source.division.tasks
    os.truncate(source / f"b.txt{suffix}", 1000)
    with pytest.raises(UserError, match=r"b\.txt.*: cannot be read"):
        preparation.into(tmp_path / "out", log=lambda line: None)
