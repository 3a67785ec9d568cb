"""The command `prepare`: impossible paths and numbers are one line, "~" is home, a full disk loses nothing."""

import errno
import io
import json
import os
import shutil
import sys

import pytest

from recollect.configuration import UserError
from recollect.data.text.preparation import manifest as prepared_format
from recollect.data.text.preparation.manifest import MANIFEST, PARTS, PLAN, write_sealed
from recollect.data.text.preparation.reader import open_prepared
from recollect.main import main
from tests.data.text.preparation.prepared_folders import (
    all_texts_of,
    assert_same,
    prepare_command,
    refused,
    write_lines,
)


@pytest.fixture
def source(tmp_path):
    write_lines(tmp_path / "in" / "a.jsonl", "one", "two", "three")
    return tmp_path / "in"


LONG = "x" * 300


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--shard-mib", "nan", "--shard-mib nan: must be a positive number"),
        ("--shard-mib", "inf", "--shard-mib inf"),
        ("--shard-mib", "0", "--shard-mib 0"),
        ("--shard-mib", "-1", "--shard-mib -1"),
        ("--processes", "0", "processes=0"),
        ("--unknown", "nan", "unknown=nan: must be a share"),
        ("--unknown", "2", "unknown=2"),
        ("--tokenizer", LONG, "File name too long"),
        ("--tokenizer", "~nobody_of_this_name/x", "Could not determine home directory"),
        ("--tokenizer", "bpe:99999999999999999999", "takes a size of at most"),
        ("--tokenizer", "bpe:100000000", "takes a size of at most 16,777,216"),
        ("--held-out", LONG, "File name too long"),
        ("--config", "english", "README.md lists no configurations"),
    ],
)
def test_impossible_options_are_one_line(source, tmp_path, capsys, option, value, said):
    assert said in refused(capsys, source, tmp_path / "out", option, value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", [LONG, f"tfds:{LONG}", "~nobody_of_this_name/x", f"{LONG}/{LONG}"])
def test_impossible_paths_are_one_line(source, tmp_path, capsys, path):
    line = refused(capsys, path, tmp_path / "out")
    assert "too long" in line or "home directory" in line or "no such file or folder" in line
    if not path.startswith("tfds:"):
        assert refused(capsys, source, path).startswith("error: ")


def denied(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_folders_without_permission_are_one_line(source, tmp_path, capsys, monkeypatch):
    from pathlib import Path

    stat, mkdir = Path.stat, Path.mkdir
    for name in ("stat", "mkdir"):
        real = {"stat": stat, "mkdir": mkdir}[name]

        def fail(self, *args, real=real, **options):
            return denied(self) if "closed" in str(self) else real(self, *args, **options)

        monkeypatch.setattr(Path, name, fail)
    line = refused(capsys, tmp_path / "closed" / "in", tmp_path / "out")
    assert "closed/in': cannot be read (Permission denied)" in line
    assert "closed/out: Permission denied" in refused(capsys, source, tmp_path / "closed" / "out")
    assert "Permission denied" in refused(capsys, source, tmp_path / "out", "--tokenizer", tmp_path / "closed" / "t")
    assert "Permission denied" in refused(capsys, source, tmp_path / "out", "--held-out", tmp_path / "closed" / "t")


def test_home_is_meant_by_a_tilde(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert prepare_command(capsys, "~/in", "~/out")[0] == 0
    assert (tmp_path / "out" / MANIFEST).exists() and not (tmp_path / "~").exists()
    assert all_texts_of("~/out") == [b"one", b"three", b"two"]


def test_a_disk_that_is_full_at_any_moment_is_one_line_and_the_same_command_goes_on(
    source, tmp_path, capsys, monkeypatch
):
    options = ("--tokenizer", "bpe:260", "--shard-mib", "0.00001")
    assert prepare_command(capsys, source, tmp_path / "whole", *options)[0] == 0
    real, left = os.fsync, [0]

    def fsync(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    out, moments = tmp_path / "out", 0
    while not (out / MANIFEST).exists():
        left[0], moments = moments, moments + 2
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            code, _, errors = prepare_command(capsys, source, out, *options)
        assert code == (0 if (out / MANIFEST).exists() else 2)
        if code:
            assert (
                len(errors) == 1
                and "No space left on device" in errors[0]
                and "the same command continues" in errors[0]
            )
    assert moments > 5
    assert_same(tmp_path / "whole", out)


def test_a_preparation_that_did_nothing_yet_leaves_its_folder_to_another(source, tmp_path, capsys):
    (source / "b.jsonl").write_text("{}\n")
    out = tmp_path / "out"
    assert "b.jsonl, line 1" in refused(capsys, source, out, "--tokenizer", "bpe:300")
    (source / "b.jsonl").unlink()
    assert prepare_command(capsys, source, out)[0] == 0
    assert all_texts_of(out) == [b"one", b"three", b"two"] and not (out / "tokenizer.json").exists()


def test_a_folder_of_an_older_format_says_what_to_do(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepared_format, "FORMAT", 1)
        assert prepare_command(capsys, source, out)[0] == 0
        for name in (MANIFEST, PLAN):
            content = json.loads((out / name).read_text())
            content = {key: value for key, value in content.items() if key not in ("sha256", "encoding", "held_out")}
            write_sealed(out / name, {**content, "format": 1, "key": "of format 1"})
    with pytest.raises(UserError, match=r"was prepared in format 1, .* reads 2; run .*into another folder"):
        open_prepared(str(out))
    assert "was prepared from something else (format 1" in refused(capsys, source, out)
    shutil.rmtree(out / PARTS)
    (out / MANIFEST).unlink()
    assert prepare_command(capsys, source, out)[0] == 0


def test_a_source_without_text_says_what_was_in_it(tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    (root / "README.md").write_text("# About")
    (root / "a.py").write_text("x = 1")
    (root / "b.py").write_text("x = 2")
    line = refused(capsys, root, tmp_path / "out")
    assert "there is no text in it; left out: 1 file (7 bytes), metadata: README.md; 2 files (10 bytes), code" in line
    assert "--include '*.py'" in line and not (tmp_path / "out").exists()
    (root / "a.jsonl").write_text('{"text": null}\n')
    assert "there is no text in it" in refused(capsys, root, tmp_path / "out")


def test_names_that_a_console_cannot_print_are_escaped(source, tmp_path, capsys, monkeypatch):
    (source / "a.jsonl").rename(source / "naïve ☃.jsonl")
    shown = io.BytesIO()
    console = io.TextIOWrapper(shown, encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        code = main(["prepare", str(source), str(tmp_path / "out"), "--processes", "1"])
    console.flush()
    assert code == 0 and b"the first na\\xefve \\u2603.jsonl" in shown.getvalue()


def test_the_summary_is_kept_in_the_manifest(source, tmp_path, capsys):
    (source / "latin.txt").write_bytes(b"\xe4")
    assert prepare_command(capsys, source, tmp_path / "out")[0] == 0
    files = json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    assert files["read"] == {"train": {"files": 1, "bytes": 50, "first": "a.jsonl"}}
    assert files["left_out"]["not UTF-8"]["first"] == "latin.txt" and files["empty"] == {"count": 0, "first": None}
