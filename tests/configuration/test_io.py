"""Files that are written whole or not at all, JSON with one-line errors, dotted names, progress."""

import errno
import hashlib

import pytest

from recollect.configuration import UserError
from recollect.configuration.disk_full import DiskFull
from recollect.configuration.io import file_sha256, first_line, flatten, replace_text, replacing, write_json
from recollect.configuration.machine import cpu_count
from recollect.configuration.read_json import read_json, read_json_object


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file.txt"
    replace_text(path, "first")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    replace_text(path, "second")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(DiskFull, match=r"file.json could not be written: No space"), replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert read_json(path) == {"a": 1}


def test_json_errors_are_one_line(tmp_path):
    path = tmp_path / "file.json"
    with pytest.raises(UserError, match=r"there is no .*file.json"):
        read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"file.json, line 1: not valid JSON"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="must hold one JSON object, not list"):
        read_json_object(path)
    with pytest.raises(UserError, match=r"cannot read .*directory"):
        read_json(tmp_path)


def test_facts(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
    assert flatten({"a": {"b": [1, 2]}, "c": None}, leaf=str) == {"a.b.0": "1", "a.b.1": "2", "c": "None"}
    assert first_line(ValueError("\n one\ntwo"), limit=2) == "on" and first_line(KeyError()) == "KeyError"
    assert cpu_count() >= 1
